//! The body of an answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use hyper::body::{Frame, SizeHint};
use tonic::Status;

/// What an answer consists of after its head.
#[derive(Debug, Default)]
pub enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// The answer to a unary call: one encoded message, then the trailers that say "OK".
    Message(Bytes),
    /// The trailers that are left of it.
    Trailers,
    /// Plain HTTP.
    Plain(Bytes),
    /// A stream.
    Stream(tonic::body::Body),
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Body::Empty => Poll::Ready(None),
            Body::Message(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Body::Trailers;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Body::Trailers => {
                *self = Body::Empty;
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Body::Plain(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Body::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Body::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Plain(bytes) => bytes.is_empty(),
            Body::Stream(body) => body.is_end_stream(),
            Body::Message(_) | Body::Trailers => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Empty => SizeHint::with_exact(0),
            Body::Plain(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Stream(body) => body.size_hint(),
            // No content-length: gRPC does not use one.
            Body::Message(_) | Body::Trailers => SizeHint::default(),
        }
    }
}

impl From<tonic::body::Body> for Body {
    fn from(body: tonic::body::Body) -> Body {
        Body::Stream(body)
    }
}
