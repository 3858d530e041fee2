//! Shows a node's metrics to Prometheus, at http://127.0.0.1:PORT/metrics, and reads them once itself.
//!
//! `cargo run -p raft-sqlite --example metrics`

use std::io::{Read as _, Write as _};
use std::time::Duration;

use raft_sqlite::metrics::MetricValue;
use raft_sqlite::{Node, NodeConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// Answers every request with the metrics; a program that has an HTTP server adds a route instead.
async fn serve(listener: TcpListener, node: Node) -> std::io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await?;
        let text = node.metrics().to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            text.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(text.as_bytes()).await?;
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let node = Node::start(NodeConfig::single(folder.path())).await?;
    node.wait_for_leader(Duration::from_secs(10)).await?;
    node.database("app").execute("CREATE TABLE t(a)").await?;

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(serve(listener, node.clone()));
    let text = tokio::task::spawn_blocking(move || -> std::io::Result<String> {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
    .await??;
    println!("{text}");
    assert!(text.contains("raft_sqlite_has_leader 1\n"));

    // For another facade: walk them. With the crate `metrics`, say, `gauge!(family.name, labels).set(value)`.
    for family in node.metrics().families {
        for sample in family.samples {
            if let MetricValue::Number(value) = sample.value {
                let _ = (&family.name, &sample.labels, value);
            }
        }
    }
    server.abort();
    node.shutdown().await?;
    Ok(())
}
