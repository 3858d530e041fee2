//! A key-value service over HTTP, on three nodes: each serves every request.
//!
//! `cargo run -p raft-sqlite --example http` shows it at work and ends; with `-- --stay` it serves until Ctrl-C:
//! ```console
//! $ curl -X PUT --data hello http://127.0.0.1:PORT/kv/greeting
//! $ curl http://127.0.0.1:PORT/kv/greeting
//! $ curl 'http://127.0.0.1:PORT/kv/greeting?local'      # this node's state, however old, without asking anybody
//! ```

use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::routing::get;
use raft_sqlite::{
    Database, ErrorClass, InitialMember, Migration, Node, NodeConfig, ReadConsistency, ReadError, SqlError, WriteError,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

type Answer<T> = Result<T, (StatusCode, String)>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let mut nodes = Vec::new();
    let members = members()?;
    for member in &members {
        let config = NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone())?;
        nodes.push(Node::start(config).await?);
    }
    let mut addresses = Vec::new();
    for node in &nodes {
        node.wait_for_leader(Duration::from_secs(30)).await?;
        let db: Database = node.database("kv").into();
        // On every node, at every start: whoever is first does it.
        db.migrate(&[Migration::new(1, "items", "CREATE TABLE item(key TEXT PRIMARY KEY, value BLOB NOT NULL)")])
            .await?;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        addresses.push(listener.local_addr()?);
        println!("{} serves http://{}", node.name(), listener.local_addr()?);
        tokio::spawn(axum::serve(listener, service(db)).into_future());
    }
    if std::env::args().any(|argument| argument == "--stay") {
        tokio::signal::ctrl_c().await?;
    } else {
        for (method, path, body) in [
            ("PUT", "/kv/greeting", "hello"),
            ("GET", "/kv/greeting", ""),
            ("GET", "/kv/greeting?local", ""),
            ("DELETE", "/kv/greeting", ""),
            ("GET", "/kv/greeting", ""),
        ] {
            // Each through another node.
            addresses.rotate_left(1);
            println!("{method} {path}: {}", request(addresses[0], method, path, body).await?);
        }
    }
    for node in &nodes {
        node.shutdown().await?;
    }
    Ok(())
}

fn service(db: Database) -> Router {
    Router::new().route("/kv/{key}", get(read).put(write).delete(remove)).with_state(db)
}

async fn read(State(db): State<Database>, Path(key): Path<String>, RawQuery(query): RawQuery) -> Answer<Vec<u8>> {
    let how = if query.as_deref() == Some("local") { ReadConsistency::Local } else { ReadConsistency::Linearizable };
    let row = db.query_optional(("SELECT value FROM item WHERE key = ?", [&key]), how).await.map_err(read_failed)?;
    let row = row.ok_or_else(|| (StatusCode::NOT_FOUND, format!("no {key}")))?;
    row.get(0).map_err(|error| read_failed(error.into()))
}

async fn write(State(db): State<Database>, Path(key): Path<String>, body: Bytes) -> Answer<StatusCode> {
    let upsert = "INSERT INTO item VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value";
    db.execute((upsert, (&key, body.as_ref()))).await.map_err(write_failed)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove(State(db): State<Database>, Path(key): Path<String>) -> Answer<StatusCode> {
    let done = db.execute(("DELETE FROM item WHERE key = ?", [&key])).await.map_err(write_failed)?;
    Ok(if done.rows_affected == 0 { StatusCode::NOT_FOUND } else { StatusCode::NO_CONTENT })
}

fn status(class: ErrorClass) -> StatusCode {
    match class {
        ErrorClass::Rejected => StatusCode::BAD_REQUEST,
        ErrorClass::Retryable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorClass::OutcomeUnknown => StatusCode::GATEWAY_TIMEOUT,
        ErrorClass::Fatal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn read_failed(error: ReadError) -> (StatusCode, String) {
    (status(error.class()), error.to_string())
}

fn write_failed(error: WriteError<SqlError>) -> (StatusCode, String) {
    (status(error.class()), error.to_string())
}

/// One request, as a client would make it: the status and the body.
async fn request(at: std::net::SocketAddr, method: &str, path: &str, body: &str) -> std::io::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(at).await?;
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: {at}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok(format!("{} {body}", head.split_whitespace().nth(1).unwrap_or("no status")))
}

fn members() -> std::io::Result<Vec<InitialMember>> {
    let member = |name: &str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        Ok(InitialMember { name: name.into(), peer_urls: vec![format!("http://{}", listener.local_addr()?)] })
    };
    ["anna", "bert", "cleo"].into_iter().map(member).collect()
}
