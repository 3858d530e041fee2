//! etcdctl (Debian's etcd-client) against one node and against three.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use raft_sqlite_tests::cluster::Cluster;
use serde_json::Value;

struct Etcdctl {
    endpoints: String,
}

impl Etcdctl {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoints]).args(arguments);
        command
    }

    fn run_with(&self, arguments: &[&str], input: &str) -> Result<(bool, String, String)> {
        use std::io::Write as _;
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("etcdctl: install Debian's etcd-client")?;
        child.stdin.take().context("stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
    }

    fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.ok_with(arguments, "")
    }

    fn ok_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let (success, stdout, stderr) = self.run_with(arguments, input)?;
        ensure!(success, "etcdctl {arguments:?} failed: {stderr}");
        Ok(stdout)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut arguments = arguments.to_vec();
        arguments.extend(["-w", "json"]);
        Ok(serde_json::from_str(&self.ok(&arguments)?)?)
    }
}

async fn exercise(size: usize) -> Result<()> {
    let cluster = Cluster::start(size).await?;
    let all = Etcdctl { endpoints: cluster.endpoints() };
    for (number, node) in cluster.nodes.iter().enumerate() {
        let ctl = Etcdctl { endpoints: node.client_url.clone() };
        let key = |name: &str| format!("node{number}/{name}");

        // put, get, del
        assert_eq!(ctl.ok(&["put", &key("a"), "1"])?.trim(), "OK");
        assert_eq!(ctl.ok(&["get", &key("a")])?, format!("{}\n1\n", key("a")));
        ctl.ok(&["put", &key("b"), "2"])?;
        let listed = ctl.ok(&["get", "--prefix", &key(""), "--keys-only"])?;
        assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), [key("a"), key("b")]);
        assert_eq!(ctl.ok(&["put", "--prev-kv", &key("a"), "3"])?, format!("OK\n{}\n1\n", key("a")));
        assert_eq!(ctl.ok(&["del", &key("b")])?.trim(), "1");
        assert_eq!(ctl.ok(&["get", &key("b")])?, "");

        // txn
        let txn = format!("value(\"{0}\") = \"3\"\n\nput {0} 4\nget {0}\n\nput {0} 5\n\n", key("a"));
        let answer = ctl.ok_with(&["txn"], &txn)?;
        assert_eq!(answer, format!("SUCCESS\n\nOK\n\n{}\n4\n", key("a")), "a read in a txn sees its writes");
        let answer = ctl.ok_with(&["txn"], &txn)?;
        assert_eq!(answer, "FAILURE\n\nOK\n");

        // watch from an old revision, through this node
        let revision = ctl.json(&["get", &key("a")])?["header"]["revision"].as_i64().context("a revision")?;
        for value in ["6", "7"] {
            all.ok(&["put", &key("a"), value])?;
        }
        let mut watch =
            ctl.command(&["watch", &key("a"), "--rev", &(revision + 1).to_string()]).stdout(Stdio::piped()).spawn()?;
        let mut lines = Vec::new();
        {
            use std::io::BufRead as _;
            let stdout = watch.stdout.take().context("stdout")?;
            for line in std::io::BufReader::new(stdout).lines().take(6) {
                lines.push(line?);
            }
        }
        watch.kill()?;
        watch.wait()?;
        assert_eq!(lines, ["PUT", &key("a"), "6", "PUT", &key("a"), "7"]);

        // leases
        let granted = ctl.ok(&["lease", "grant", "300"])?;
        let id = granted.split_whitespace().nth(1).context("a lease id")?.to_owned();
        ctl.ok(&["put", &format!("--lease={id}"), &key("leased"), "x"])?;
        let left = ctl.ok(&["lease", "timetolive", &id, "--keys"])?;
        assert!(left.contains("granted with TTL(300s)") && left.contains(&key("leased")), "{left}");
        assert!(ctl.ok(&["lease", "list"])?.contains(&id));
        assert!(ctl.ok(&["lease", "keep-alive", "--once", &id])?.contains("keepalived with TTL(300)"));
        assert!(ctl.ok(&["lease", "revoke", &id])?.contains("revoked"));
        assert_eq!(ctl.ok(&["get", &key("leased")])?, "", "its keys go with a lease");

        // compaction
        let revision = ctl.json(&["get", &key("a")])?["header"]["revision"].as_i64().context("a revision")?;
        let compacted = ctl.ok(&["compaction", &revision.to_string()])?;
        assert_eq!(compacted.trim(), format!("compacted revision {revision}"));
        let (success, _, stderr) = ctl.run_with(&["get", &key("a"), "--rev", &(revision - 1).to_string()], "")?;
        assert!(!success && stderr.contains("required revision has been compacted"), "{stderr}");
        let (success, _, stderr) = ctl.run_with(&["compaction", &revision.to_string()], "")?;
        assert!(!success && stderr.contains("required revision has been compacted"), "{stderr}");
    }

    // endpoint status and health, member list. etcdctl 3.4 sends the endpoint as it was given for the HTTP/2 authority, which may hold no
    // scheme: hyper refuses it (docs/etcd-compatibility.md), so these are given as HOST:PORT.
    let all = Etcdctl { endpoints: cluster.endpoints().replace("http://", "") };
    let statuses = all.json(&["endpoint", "status"])?;
    let statuses = statuses.as_array().context("a list")?;
    assert_eq!(statuses.len(), size);
    let leaders: Vec<_> = statuses
        .iter()
        .filter(|status| status["Status"]["leader"] == status["Status"]["header"]["member_id"])
        .collect();
    assert_eq!(leaders.len(), 1, "{statuses:?}");
    for status in statuses {
        assert!(status["Status"]["dbSize"].as_i64().unwrap_or(0) > 0, "{status}");
    }
    // etcdctl 3.4 says it on standard error.
    let (_, stdout, stderr) = all.run_with(&["endpoint", "health"], "")?;
    let healthy = stdout + &stderr;
    assert_eq!(healthy.matches("is healthy").count(), size, "{healthy}");
    let members = all.json(&["member", "list"])?;
    let members = members["members"].as_array().context("members")?;
    let names: Vec<&str> = members.iter().filter_map(|member| member["name"].as_str()).collect();
    assert_eq!(names.len(), size, "{members:?}");
    for node in &cluster.nodes {
        assert!(names.contains(&node.name.as_str()), "{names:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node() -> Result<()> {
    exercise(1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes() -> Result<()> {
    exercise(3).await
}
