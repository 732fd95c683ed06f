//! Limits on what an API server that others choose may send.
//!
//! kube collects the whole of a response, and of a watch each line, before it reads any of it.

use std::{
    error::Error,
    task::{Context, Poll},
};

use axum::{
    BoxError,
    body::{Body, Bytes, HttpBody},
    http::{Request, Response, Uri},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use kube::client::Body as ClientBody;
use tower::Service;

/// Number of objects in one page of a list, and after a response was too long. The limit of a page fits the latter with the
/// most annotations that Kubernetes allows, 256 KiB each.
pub(crate) const PAGE: u32 = 500;
pub(crate) const SHORT_PAGE: u32 = 50;
/// Maximum size of a response that is no watch, in bytes.
const MAX_PAGE_BYTES: usize = 16 << 20;
/// Maximum size of one line of a watch, in bytes: one event. An API server accepts no object of more than 3 MiB.
const MAX_LINE_BYTES: usize = 4 << 20;

/// A client's connections, with a limit on each response.
#[derive(Clone, Debug)]
pub(crate) struct Limited<S>(pub(crate) S);

impl<S, B> Service<Request<ClientBody>> for Limited<S>
where
    S: Service<Request<ClientBody>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<ClientBody>) -> Self::Future {
        let is_watch = is_watch(request.uri());
        let answer = self.0.call(request);
        answer
            .map(move |answer| {
                let answer = answer?;
                // The reason of a refusal is collected, also of a watch.
                let limit = match is_watch && answer.status().is_success() {
                    true => Limit::Line(0),
                    false => Limit::Whole(0),
                };
                Ok(answer.map(|body| limited(body, limit)))
            })
            .boxed()
    }
}

fn is_watch(uri: &Uri) -> bool {
    let mut parameters = uri.query().unwrap_or_default().split('&');
    parameters.any(|parameter| matches!(parameter, "watch=true" | "watch=1"))
}

/// Passes `body` on until there is too much of it.
fn limited<B>(body: B, mut limit: Limit) -> Body
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let data = Body::new(body).into_data_stream();
    Body::from_stream(data.map(move |bytes| -> Result<Bytes, BoxError> {
        let bytes = bytes?;
        limit.take(&bytes)?;
        Ok(bytes)
    }))
}

/// What is limited, and how many bytes of it there are so far.
#[derive(Debug, PartialEq, Eq)]
enum Limit {
    Whole(usize),
    Line(usize),
}

/// A response is too long.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum TooLong {
    #[error("the API server's response is longer than {MAX_PAGE_BYTES} bytes, the limit of one")]
    Response,
    #[error(
        "a line of the API server's watch is longer than {MAX_LINE_BYTES} bytes, the limit of one"
    )]
    Line,
}

/// Reports whether a call failed because the response is too long.
pub(crate) fn is_too_long(error: &(dyn Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(TooLong::Response))
        || error.source().is_some_and(is_too_long)
}

impl Limit {
    /// Counts more bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        match self {
            Self::Whole(length) => {
                *length = length.saturating_add(bytes.len());
                match *length <= MAX_PAGE_BYTES {
                    true => Ok(()),
                    false => Err(TooLong::Response),
                }
            }
            Self::Line(length) => {
                for part in bytes.split_inclusive(|byte| *byte == b'\n') {
                    *length = length.saturating_add(part.len());
                    if *length > MAX_LINE_BYTES {
                        return Err(TooLong::Line);
                    }
                    if part.ends_with(b"\n") {
                        *length = 0;
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::TryStreamExt;
    use kube::{
        Api, Client,
        api::{ListParams, WatchParams},
    };
    use tower::service_fn;

    use super::*;
    use crate::{objects, with_causes};

    /// Pods of an API server that answers with this status, and with as many copies of `part` as fill `length` bytes.
    fn pods(status: u16, part: &str, length: usize) -> Api<objects::Pod> {
        let (part, copies) = (Bytes::from(part.to_owned()), length / part.len());
        let answer = move |_: Request<ClientBody>| {
            let parts = std::iter::repeat_n(Ok::<_, Infallible>(part.clone()), copies);
            let body = Body::from_stream(futures_util::stream::iter(parts));
            let response = Response::builder().status(status).body(body);
            std::future::ready(response)
        };
        Api::all(Client::new(Limited(service_fn(answer)), "default"))
    }

    #[tokio::test]
    async fn a_list_has_a_limit_however_it_is_divided() {
        for part in [" ", "\n"] {
            let part = part.repeat(4096);
            let pods = pods(200, &part, MAX_PAGE_BYTES + part.len());
            let error = pods.list(&ListParams::default()).await.err().unwrap();
            assert!(is_too_long(&error));
            let error = with_causes(&error);
            assert!(error.contains("longer than 16777216 bytes"), "{error}");
        }
    }

    #[tokio::test]
    async fn of_a_watch_each_line_has_a_limit_and_a_refusal_the_limit_of_a_list() {
        let space = " ".repeat(4096);
        let event = format!(
            "{space}{}\n",
            r#"{"type": "BOOKMARK", "object": {"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}}}"#
        );
        let many = MAX_PAGE_BYTES + (1 << 20);
        for (status, part, expected) in [
            (200, &event, None),
            (200, &space, Some("a line of the API server's watch")),
            (403, &event, Some("longer than 16777216 bytes")),
        ] {
            let pods = pods(status, part, many);
            let read = async {
                let events = pods.watch(&WatchParams::default(), "1").await?;
                let count = |count, _| std::future::ready(Ok(count + 1));
                events.try_fold(0, count).await
            };
            match (read.await, expected) {
                (Ok(count), None) => assert_eq!(count, many / event.len()),
                (Err(error), Some(expected)) => {
                    let error = with_causes(&error);
                    assert!(error.contains(expected), "{error}");
                }
                (read, expected) => panic!("{read:?} instead of {expected:?}"),
            }
        }
    }

    #[test]
    fn a_line_may_come_in_parts() {
        let mut limit = Limit::Line(0);
        let part = vec![b'x'; MAX_LINE_BYTES / 2];
        assert_eq!(limit.take(&part), Ok(()));
        assert_eq!(limit.take(b"\n"), Ok(()));
        assert_eq!(limit, Limit::Line(0));
        assert_eq!((limit.take(&part), limit.take(&part)), (Ok(()), Ok(())));
        assert_eq!(limit.take(b"x"), Err(TooLong::Line));
    }
}
