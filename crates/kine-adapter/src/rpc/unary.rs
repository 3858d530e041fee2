//! One message in, one message out.
//!
//! A gRPC message is a flag byte (0: not compressed), a length in four bytes (big endian), and that many bytes of
//! protobuf. The decoded request's keys and values are slices of the received buffer.

use std::pin::Pin;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderValue, Request, Response, header::CONTENT_TYPE};
use prost::Message;
use tonic::Status;

use super::body::Body;

/// Flag and length.
const HEAD_BYTES: usize = 5;
/// What gRPC answers with.
pub(super) const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Answers a unary call. `limit_bytes` bounds the encoded request.
pub(super) async fn unary<B, Q, A, F>(
    request: Request<B>,
    limit_bytes: usize,
    call: impl FnOnce(Q) -> F,
) -> Response<Body>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Status>>,
{
    let message = match receive(request.into_body(), limit_bytes).await {
        Ok(message) => message,
        Err(status) => return refuse(&status),
    };
    let answer = match Q::decode(message) {
        Ok(request) => call(request).await,
        Err(error) => Err(Status::internal(format!("grpc: failed to unmarshal the received message: {error}"))),
    };
    match answer {
        Ok(answer) => accept(&answer),
        Err(status) => refuse(&status),
    }
}

/// The answer that consists of this error.
pub(super) fn refuse(status: &Status) -> Response<Body> {
    status.clone().into_http()
}

fn accept(answer: &impl Message) -> Response<Body> {
    let size = answer.encoded_len();
    let Ok(announced) = u32::try_from(size) else {
        return refuse(&Status::resource_exhausted(format!("grpc: message too large ({size} bytes)")));
    };
    let mut bytes = BytesMut::with_capacity(HEAD_BYTES + size);
    bytes.put_u8(0);
    bytes.put_u32(announced);
    answer.encode_raw(&mut bytes);
    let mut response = Response::new(Body::Message(bytes.freeze()));
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

/// The one message of the request.
async fn receive<B>(body: B, limit_bytes: usize) -> Result<Bytes, Status>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut body = std::pin::pin!(body);
    let mut first = Bytes::new();
    let mut more = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|context| Pin::as_mut(&mut body).poll_frame(context)).await {
        let frame = frame.map_err(|error| Status::cancelled(format!("request not received: {}", error.into())))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if more.is_empty() && first.is_empty() {
            first = data;
        } else {
            if more.is_empty() {
                more.reserve(announced(&first, limit_bytes)?.unwrap_or(0).max(first.len() + data.len()));
                more.extend_from_slice(&first);
            }
            more.extend_from_slice(&data);
        }
        let received = if more.is_empty() { &first } else { &more[..] };
        if let Some(size) = announced(received, limit_bytes)?
            && received.len() > size
        {
            return Err(Status::internal("grpc: more than one message in a unary request"));
        }
    }
    let mut message = if more.is_empty() { first } else { more.freeze() };
    match announced(&message, limit_bytes)? {
        Some(size) if size == message.len() => {
            message.advance(HEAD_BYTES);
            Ok(message)
        }
        _ => Err(Status::internal("grpc: the request ended within its message")),
    }
}

/// The size of head and message, once the head is there.
fn announced(received: &[u8], limit_bytes: usize) -> Result<Option<usize>, Status> {
    let Some((head, _)) = received.split_first_chunk::<HEAD_BYTES>() else {
        return Ok(None);
    };
    if head[0] != 0 {
        return Err(Status::unimplemented("grpc: compressed requests are not taken"));
    }
    let size = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if size > limit_bytes {
        // The words of grpc-go, which etcd's clients know.
        let message = format!("grpc: received message larger than max ({size} vs. {limit_bytes})");
        return Err(Status::resource_exhausted(message));
    }
    Ok(Some(HEAD_BYTES + size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::{PutRequest, PutResponse};
    use hyper::body::Frame;
    use std::collections::VecDeque;
    use std::task::{Context, Poll};
    use tonic::Code;

    struct Pieces(VecDeque<Bytes>);

    impl hyper::body::Body for Pieces {
        type Data = Bytes;
        type Error = std::convert::Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
        }
    }

    fn message(size_of_value: usize) -> Vec<u8> {
        let request = PutRequest { key: "k".into(), value: vec![7; size_of_value].into(), ..Default::default() };
        let mut bytes = vec![0];
        bytes.put_u32(u32::try_from(request.encoded_len()).unwrap());
        request.encode(&mut bytes).unwrap();
        bytes
    }

    async fn status_of(pieces: Vec<Vec<u8>>, limit_bytes: usize) -> (Code, String) {
        let pieces = Pieces(pieces.into_iter().map(Bytes::from).collect());
        let response = unary(Request::new(pieces), limit_bytes, |request: PutRequest| async move {
            assert_eq!(request.key, "k");
            assert!(request.value.iter().all(|byte| *byte == 7));
            Ok(PutResponse::default())
        })
        .await;
        match Status::from_header_map(response.headers()) {
            Some(status) => (status.code(), status.message().to_owned()),
            None => (Code::Ok, String::new()),
        }
    }

    #[tokio::test]
    async fn a_message_may_come_in_pieces_cut_anywhere() {
        let whole = message(20);
        assert_eq!(status_of(vec![whole.clone()], 100).await.0, Code::Ok);
        for cut in 1..whole.len() {
            let (head, tail) = whole.split_at(cut);
            assert_eq!(status_of(vec![head.to_vec(), tail.to_vec()], 100).await.0, Code::Ok, "cut at {cut}");
        }
        let pieces: Vec<Vec<u8>> = whole.iter().map(|byte| vec![*byte]).collect();
        assert_eq!(status_of(pieces, 100).await.0, Code::Ok);
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused() {
        let whole = message(20);
        assert_eq!(status_of(vec![], 100).await.0, Code::Internal);
        assert_eq!(status_of(vec![whole[..9].to_vec()], 100).await.0, Code::Internal);
        assert_eq!(status_of(vec![[whole.clone(), vec![0]].concat()], 100).await.0, Code::Internal);
        assert_eq!(status_of(vec![[&[1][..], &whole[1..]].concat()], 100).await.0, Code::Unimplemented);
        assert_eq!(status_of(vec![vec![0, 0, 0, 0, 1, 255]], 100).await.0, Code::Internal);
        let (code, text) = status_of(vec![message(200)], 100).await;
        assert_eq!(
            (code, text.as_str()),
            (Code::ResourceExhausted, "grpc: received message larger than max (206 vs. 100)")
        );
    }
}
