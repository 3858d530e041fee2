//! Where peers' connections come from: addresses, listeners that the program has bound, or any stream of connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tonic::transport::server::Connected;

use super::tls::Tls;

/// Connections that may agree about encryption at the same time.
const MAX_HANDSHAKES: usize = 256;
/// Pause after a connection could not be taken: the process has no file descriptor left, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

/// A peer's connection, of whatever kind.
pub struct Connection(Pin<Box<dyn Stream>>);

impl Connection {
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

/// Connections, one after another.
pub type Connections = BoxStream<'static, Connection>;

/// Takes connections for ever.
pub fn of_listener(listener: TcpListener) -> Connections {
    let connections = futures_util::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Small answers must not wait for the acknowledgement of the ones before.
                    let _ = stream.set_nodelay(true);
                    return Some((Connection::new(stream), listener));
                }
                Err(error) => {
                    // A listener that ended here would leave a member that nobody reaches and that looks well.
                    tracing::warn!(%error, "a peer's connection could not be taken: trying on");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Box::pin(connections)
}

/// Encrypted, if `tls` is on. A connection that does not come to terms is dropped, and holds up none of the others.
pub fn encrypted(
    connections: Connections,
    tls: Tls,
) -> impl futures_util::Stream<Item = io::Result<Connection>> + Send + 'static {
    connections
        .map(move |connection| {
            let tls = tls.clone();
            async move { tls.accept(connection).await }
        })
        .buffer_unordered(MAX_HANDSHAKES)
        .filter_map(|connection| async move {
            match connection {
                Ok(connection) => Some(Ok(connection)),
                Err(error) => {
                    tracing::warn!(%error, "a peer's connection did not come to terms about TLS");
                    None
                }
            }
        })
}
