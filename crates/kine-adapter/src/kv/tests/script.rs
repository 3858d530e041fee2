//! Runs the scripts in scripts/: commands, and what etcd answers to them.
//!
//! A script is a list of commands, each followed by the answer, which is indented. The answers in the files are those of
//! a real etcd 3.7 (the same scripts were run against one); `UPDATE_SCRIPTS=1` writes ours instead, for review.
//!
//! ```text
//! put KEY VALUE [lease=N] [prev] [ignore_value] [ignore_lease]      VALUE - is empty
//! get KEY [END] [rev= limit= sort=TARGET:ORDER min_mod= max_mod= min_create= max_create=] [keys_only] [count_only]
//! del KEY [END] [prev]                                              END .. is "\0"
//! txn ( COMPARE , ... ) ( OP , ... ) ( OP , ... )                   OP: a put, get, del or txn, or nothing: noop
//!     COMPARE: TARGET KEY [END] RESULT OPERAND                      TARGET: version create mod value lease
//! compact REV      grant ID TTL      revoke ID
//! ```

use super::Bench;
use crate::error::KvError;
use crate::kv::check;
use crate::kv::request::{Write, Written};
use crate::kv::view::{self, Fault, Values};
use crate::proto::etcdserverpb::compare::TargetUnion;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
};
use crate::proto::mvccpb::KeyValue;
use bytes::Bytes;
use std::fmt::Write as _;

/// A command, parsed.
#[derive(Debug, Clone)]
pub(super) enum Command {
    Get(RangeRequest),
    Write(Write),
}

struct Words<'a> {
    words: std::iter::Peekable<std::str::SplitWhitespace<'a>>,
}

impl<'a> Words<'a> {
    fn next(&mut self) -> &'a str {
        self.words.next().expect("a word is missing")
    }

    /// The next word, unless it ends an operation.
    fn option(&mut self) -> Option<&'a str> {
        self.words.next_if(|word| !matches!(*word, "," | ")"))
    }

    fn key(&mut self) -> Bytes {
        Bytes::copy_from_slice(self.next().as_bytes())
    }

    fn end(&mut self) -> Bytes {
        let is_end =
            |word: &&str| !matches!(*word, "," | ")" | "prev" | "keys_only" | "count_only") && !word.contains('=');
        match self.words.next_if(is_end) {
            None => Bytes::new(),
            Some("..") => Bytes::from_static(b"\0"),
            Some(end) => Bytes::copy_from_slice(end.as_bytes()),
        }
    }

    /// The items of a list in parentheses.
    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Vec<T> {
        assert_eq!(self.next(), "(");
        let mut items = Vec::new();
        loop {
            if self.words.next_if_eq(&")").is_some() {
                return items;
            }
            items.extend(item(self));
            self.words.next_if_eq(&",");
        }
    }

    fn put(&mut self) -> PutRequest {
        let key = self.key();
        let value = match self.next() {
            "-" => Bytes::new(),
            value => Bytes::copy_from_slice(value.as_bytes()),
        };
        let mut request = PutRequest { key, value, ..PutRequest::default() };
        while let Some(option) = self.option() {
            match option.split_once('=').unwrap_or((option, "")) {
                ("lease", id) => request.lease = id.parse().unwrap(),
                ("prev", _) => request.prev_kv = true,
                ("ignore_value", _) => request.ignore_value = true,
                ("ignore_lease", _) => request.ignore_lease = true,
                other => panic!("{other:?}"),
            }
        }
        request
    }

    fn get(&mut self) -> RangeRequest {
        let (key, range_end) = (self.key(), self.end());
        let mut request = RangeRequest { key, range_end, ..RangeRequest::default() };
        while let Some(option) = self.option() {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let number = || value.parse().unwrap();
            match name {
                "rev" => request.revision = number(),
                "limit" => request.limit = number(),
                "min_mod" => request.min_mod_revision = number(),
                "max_mod" => request.max_mod_revision = number(),
                "min_create" => request.min_create_revision = number(),
                "max_create" => request.max_create_revision = number(),
                "keys_only" => request.keys_only = true,
                "count_only" => request.count_only = true,
                "sort" => {
                    let (target, order) = value.split_once(':').unwrap();
                    request.sort_target = position(&["key", "version", "create", "mod", "value"], target);
                    request.sort_order = position(&["none", "ascend", "descend"], order);
                }
                other => panic!("{other}"),
            }
        }
        request
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let (key, range_end) = (self.key(), self.end());
        let prev_kv = self.option().is_some_and(|option| option == "prev");
        DeleteRangeRequest { key, range_end, prev_kv }
    }

    fn compare(&mut self) -> Compare {
        let target = position(&["version", "create", "mod", "value", "lease"], self.next());
        let key = self.key();
        let results = ["=", ">", "<", "!="];
        let is_result = |word: &&str| results.contains(word) || word.parse::<i32>().is_ok();
        let range_end = if self.words.peek().is_some_and(is_result) { Bytes::new() } else { self.end() };
        let result = position(&results, self.next());
        let operand = self.next();
        let number = || operand.parse().unwrap();
        let union = match target {
            0 => TargetUnion::Version(number()),
            1 => TargetUnion::CreateRevision(number()),
            2 => TargetUnion::ModRevision(number()),
            3 => TargetUnion::Value(Bytes::copy_from_slice(operand.as_bytes())),
            _ => TargetUnion::Lease(number()),
        };
        Compare { result, target, key, range_end, target_union: Some(union) }
    }

    fn op(&mut self) -> RequestOp {
        let request = match self.next() {
            "put" => Some(Request::RequestPut(self.put())),
            "get" => Some(Request::RequestRange(self.get())),
            "del" => Some(Request::RequestDeleteRange(self.delete())),
            "txn" => Some(Request::RequestTxn(self.txn())),
            "noop" => None,
            other => panic!("{other}"),
        };
        RequestOp { request }
    }

    fn txn(&mut self) -> TxnRequest {
        TxnRequest {
            compare: self.list(|words| Some(words.compare())),
            success: self.list(|words| Some(words.op())),
            failure: self.list(|words| Some(words.op())),
        }
    }
}

fn position(names: &[&str], name: &str) -> i32 {
    match name.parse() {
        Ok(number) => number, // for what has no name
        Err(_) => names.iter().position(|n| *n == name).unwrap_or_else(|| panic!("{name}")) as i32,
    }
}

pub(super) fn parse(line: &str) -> Command {
    let mut words = Words { words: line.split_whitespace().peekable() };
    let number = |words: &mut Words<'_>| words.next().parse().unwrap();
    match words.next() {
        "put" => Command::Write(Write::Put(words.put())),
        "get" => Command::Get(words.get()),
        "del" => Command::Write(Write::DeleteRange(words.delete())),
        "txn" => Command::Write(Write::Txn(words.txn())),
        "compact" => Command::Write(Write::Compact(CompactionRequest { revision: number(&mut words), physical: true })),
        "grant" => {
            let (id, ttl) = (number(&mut words), number(&mut words));
            Command::Write(Write::Grant(LeaseGrantRequest { id, ttl }))
        }
        "revoke" => Command::Write(Write::Revoke(LeaseRevokeRequest { id: number(&mut words) })),
        other => panic!("{other}"),
    }
}

fn show_kv(out: &mut String, kv: &KeyValue) {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    let _ = write!(
        out,
        " {}={}@c{}m{}v{}l{}",
        text(&kv.key),
        text(&kv.value),
        kv.create_revision,
        kv.mod_revision,
        kv.version,
        kv.lease
    );
}

fn show_header(out: &mut String, header: Option<ResponseHeader>) {
    let _ = write!(out, "rev={}", header.unwrap().revision);
}

fn show_range(out: &mut String, response: &RangeResponse) {
    show_header(out, response.header);
    let _ = write!(out, " count={}{}", response.count, if response.more { " more" } else { "" });
    response.kvs.iter().for_each(|kv| show_kv(out, kv));
}

fn show_put(out: &mut String, response: &PutResponse) {
    show_header(out, response.header);
    if let Some(kv) = &response.prev_kv {
        out.push_str(" prev");
        show_kv(out, kv);
    }
}

fn show_delete(out: &mut String, response: &DeleteRangeResponse) {
    show_header(out, response.header);
    let _ = write!(out, " deleted={}", response.deleted);
    response.prev_kvs.iter().for_each(|kv| show_kv(out, kv));
}

fn show_txn(out: &mut String, response: &TxnResponse) {
    show_header(out, response.header);
    out.push_str(if response.succeeded { " then (" } else { " else (" });
    for (at, op) in response.responses.iter().enumerate() {
        out.push_str(if at > 0 { " , " } else { " " });
        match op.response.as_ref().unwrap() {
            Response::ResponseRange(response) => show_range(out, response),
            Response::ResponsePut(response) => show_put(out, response),
            Response::ResponseDeleteRange(response) => show_delete(out, response),
            Response::ResponseTxn(response) => show_txn(out, response),
        }
    }
    out.push_str(" )");
}

pub(super) fn show(answer: Result<Written, KvError>) -> String {
    let mut out = String::new();
    match answer {
        Ok(Written::Put(response)) => show_put(&mut out, &response),
        Ok(Written::DeleteRange(response)) => show_delete(&mut out, &response),
        Ok(Written::Txn(response)) => show_txn(&mut out, &response),
        Ok(Written::Compact(response)) => show_header(&mut out, response.header),
        Ok(Written::Grant(response)) => {
            show_header(&mut out, response.header);
            let _ = write!(out, " id={} ttl={}", response.id, response.ttl);
        }
        Ok(Written::Revoke(response)) => show_header(&mut out, response.header),
        Err(error) => return format!("error: {error}"),
    }
    out
}

impl Bench {
    fn values(&self) -> Values<'_> {
        Values { cache: &self.replica.cache, connection: Some(&self.connection), committed: true }
    }

    /// As a reader sees it.
    pub(super) fn get(&self, request: &RangeRequest) -> Result<RangeResponse, KvError> {
        check::range(request)?;
        refused(view::range(&self.replica.state().contents, self.values(), request))
    }

    /// Executes a command and shows the answer. Txns that only read go the way that [`crate::kv::Store`] sends them.
    pub(super) fn command(&mut self, line: &str) -> String {
        match parse(line) {
            Command::Get(request) => match self.get(&request) {
                Ok(response) => {
                    let mut out = String::new();
                    show_range(&mut out, &response);
                    out
                }
                Err(error) => format!("error: {error}"),
            },
            Command::Write(Write::Txn(request)) if check::is_readonly(&request) => {
                let checked = check::txn(&request, self.options.max_txn_ops);
                let state = self.replica.state();
                let answer =
                    checked.and_then(|()| refused(view::readonly_txn(&state.contents, self.values(), &request)));
                show(answer.map(Written::Txn))
            }
            Command::Write(request) => {
                let answer = self.write(&request);
                if matches!((&request, &answer), (Write::Compact(_), Ok(_))) {
                    self.remove(2);
                }
                show(answer)
            }
        }
    }
}

fn refused<T>(result: Result<T, Fault>) -> Result<T, KvError> {
    result.map_err(|fault| match fault {
        Fault::Refused(error) => error,
        other => panic!("{other:?}"),
    })
}

/// Commands with the answers that the script has for them.
fn commands(script: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in script.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        match line.strip_prefix("    ") {
            Some(answer) => commands.last_mut().unwrap().1 = answer.to_owned(),
            None => commands.push((line.to_owned(), String::new())),
        }
    }
    commands
}

fn run_script(name: &str, script: &str) {
    let mut bench = Bench::new();
    let update = std::env::var_os("UPDATE_SCRIPTS").is_some();
    let mut answers = Vec::new();
    for (line, want) in commands(script) {
        let got = bench.command(&line);
        if !update {
            assert_eq!(got, want, "{name}: {line}");
        }
        answers.push(got);
        bench.check();
    }
    if update {
        let mut answers = answers.into_iter();
        let mut out = String::new();
        for line in script.lines().filter(|line| !line.starts_with("    ")) {
            let _ = writeln!(out, "{line}");
            if !line.trim().is_empty() && !line.starts_with('#') {
                let _ = writeln!(out, "    {}", answers.next().unwrap());
            }
        }
        let path = format!("{}/src/kv/tests/scripts/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(path, out).unwrap();
    }
}

/// KINE_SCRIPTS names a directory of further scripts, with the answers of a real etcd: long random ones, say.
#[test]
fn scripts_named_by_the_environment() {
    let Some(directory) = std::env::var_os("KINE_SCRIPTS") else {
        return;
    };
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        run_script(&path.display().to_string(), &std::fs::read_to_string(&path).unwrap());
    }
}

macro_rules! scripts {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run_script(stringify!($name), include_str!(concat!("scripts/", stringify!($name), ".txt")));
        })*
    };
}

scripts! {
    revisions
    put_options
    range_options
    old_revisions
    txn_compares
    txn_order_and_effects
    txn_checks
    txn_shape
    compaction
    leases
}
