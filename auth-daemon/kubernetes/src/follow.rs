//! Watches of objects: at the daemon's own API server, and at those that others choose.

use std::{fmt::Debug, time::Duration};

use auth_support::backoff;
use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use kube::{
    Api, Resource,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::{limits, with_causes};

/// Pauses after the first failure of a watch and after many. With 5,000 nodes, an API server that is available again
/// receives at most 1,000 requests per second.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Time for one list, with all its pages. A slow API server takes seconds for each of some hundred.
const LIST: Duration = Duration::from_secs(30 * 60);
/// Pause after what was read has been refused: it is probably the same the next time.
const REFUSED_PAUSE: Duration = Duration::from_secs(300);

/// Pauses between attempts at a watch. They stay short, because after a long outage of the API server its clients
/// should not wait long for their first update.
#[derive(Debug, Default)]
struct Pauses {
    /// Number of consecutive failures.
    earlier: u32,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = backoff::pause(FIRST_PAUSE, LONGEST_PAUSE, self.earlier, rand::random());
        self.earlier = self.earlier.saturating_add(1);
        Some(pause)
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.earlier = 0;
    }
}

/// Watches objects indefinitely: lists them, follows the changes, and lists them again if the API server can no longer
/// report the changes. Yields nothing while the API server is unavailable. `what` names the objects in the log.
pub fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    what: &'static str,
) -> impl Stream<Item = watcher::Event<K>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let events = watcher(api, config).backoff(Pauses::default());
    events.filter_map(move |event| {
        let event = event.inspect_err(|error| {
            tracing::error!(
                error = %with_causes(error),
                "cannot watch {what}; keeping the known state"
            );
        });
        std::future::ready(event.ok())
    })
}

/// As [`follow`], but for an API server that others choose (see [`connect_by`](super::connect_by)): yields why it
/// cannot be read, and then lists the objects again, so that the end of the list shows that it can be. `read` takes
/// each event. An event that it refuses counts as a failure, and is requested again after five minutes. Lists come in
/// shorter pages once a response was too long.
pub fn follow_or_fail<K, T, R>(
    api: Api<K>,
    config: watcher::Config,
    read: R,
) -> impl Stream<Item = Result<T, String>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    R: FnMut(watcher::Event<K>) -> Result<T, String> + Send,
    T: Send,
{
    let reading = Reading::new(api, config.page_size(limits::PAGE), read);
    stream::unfold(reading, |mut reading| async move {
        let event = reading.next().await?;
        Some((event, reading))
    })
}

/// The watch of [`follow_or_fail`].
struct Reading<K, R> {
    api: Api<K>,
    config: watcher::Config,
    read: R,
    events: BoxStream<'static, Result<watcher::Event<K>, watcher::Error>>,
    pauses: Pauses,
    /// How long to wait before the next event.
    pause: Duration,
    /// Time for one list.
    list: Duration,
    /// When the list in progress must have ended.
    list_ends: Option<Instant>,
}

impl<K, R> Reading<K, R>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    fn new(api: Api<K>, config: watcher::Config, read: R) -> Self {
        Self {
            events: watcher(api.clone(), config.clone()).boxed(),
            api,
            config,
            read,
            pauses: Pauses::default(),
            pause: Duration::ZERO,
            list: LIST,
            list_ends: None,
        }
    }

    async fn next<T>(&mut self) -> Option<Result<T, String>>
    where
        R: FnMut(watcher::Event<K>) -> Result<T, String>,
    {
        tokio::time::sleep(std::mem::take(&mut self.pause)).await;
        let event = match self.next_event().await? {
            Ok(event) => event,
            Err(error) => {
                let pause = self.pauses.next()?;
                self.begin_again(pause);
                return Some(Err(error));
            }
        };
        match &event {
            watcher::Event::Init => self.list_ends = Some(Instant::now() + self.list),
            watcher::Event::InitApply(_) => {}
            _ => {
                self.list_ends = None;
                self.pauses.reset();
            }
        }
        let read = (self.read)(event);
        if read.is_err() {
            self.begin_again(REFUSED_PAUSE);
        }
        Some(read)
    }

    /// Waits for the next event, if it is of a list as long as the list may take.
    async fn next_event(&mut self) -> Option<Result<watcher::Event<K>, String>> {
        let next = self.events.next();
        let event = match self.list_ends {
            Some(end) => match timeout_at(end, next).await {
                Ok(event) => event,
                Err(_) => {
                    let list = self.list;
                    return Some(Err(format!(
                        "the API server has not sent the whole list within {list:?}"
                    )));
                }
            },
            None => next.await,
        };
        Some(event?.map_err(|error| {
            if limits::is_too_long(&error) {
                self.config.page_size = Some(limits::SHORT_PAGE);
            }
            with_causes(&error)
        }))
    }

    /// Lists the objects again after `pause`.
    fn begin_again(&mut self, pause: Duration) {
        self.events = watcher(self.api.clone(), self.config.clone()).boxed();
        self.pause = pause;
        self.list_ends = None;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{
        body::Body,
        http::{Request, Response},
    };
    use kube::{Client, client::Body as ClientBody};
    use tower::service_fn;

    use super::*;
    use crate::objects;

    #[test]
    fn an_api_server_that_is_back_is_asked_soon() {
        let mut pauses = Pauses::default();
        let first = pauses.next().unwrap();
        assert!(first <= FIRST_PAUSE, "{first:?}");
        let later: Vec<_> = pauses.by_ref().take(100).collect();
        assert!(
            later.iter().all(|pause| *pause <= LONGEST_PAUSE),
            "{later:?}"
        );
        assert!(
            later[90..].iter().all(|pause| *pause >= LONGEST_PAUSE / 2),
            "{later:?}"
        );
        pauses.reset();
        assert!(pauses.next().unwrap() <= FIRST_PAUSE);
    }

    /// Pods of an API server whose lists never end: each page has `pods` pods, and says that there is one more page.
    fn endless_list(pods: &str) -> Api<objects::Pod> {
        let page = format!(
            r#"{{"kind": "PodList", "apiVersion": "v1", "metadata": {{"resourceVersion": "1", "continue": "x"}}, "items": [{pods}]}}"#
        );
        let answer = move |_| {
            let page = page.clone();
            async { Ok::<_, Infallible>(Response::new(Body::from(page))) }
        };
        Api::all(Client::new(service_fn(answer), "default"))
    }

    #[tokio::test]
    async fn a_list_without_end_is_left() {
        for pods in ["", r#"{"metadata": {"name": "web"}}"#] {
            let mut reading = Reading::new(endless_list(pods), watcher::Config::default(), Ok);
            reading.list = Duration::from_millis(50);
            let error = loop {
                if let Err(error) = reading.next().await.unwrap() {
                    break error;
                }
            };
            assert!(
                error.contains("has not sent the whole list within 50ms"),
                "{error}"
            );
            // The next one begins soon, with its own time.
            assert!(reading.pause <= FIRST_PAUSE && reading.list_ends.is_none());
            assert!(matches!(
                reading.next().await,
                Some(Ok(watcher::Event::Init))
            ));
            assert!(reading.list_ends.is_some());
        }
    }

    #[tokio::test]
    async fn after_a_page_that_is_too_long_pages_are_short() {
        let answer = |request: Request<ClientBody>| async move {
            let query = request.uri().query().unwrap_or_default();
            let body = match query.contains("limit=500") {
                true => " ".repeat(17 << 20),
                false => {
                    assert!(query.contains("limit=50"), "{query}");
                    r#"{"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []}"#.to_owned()
                }
            };
            Ok::<_, Infallible>(Response::new(Body::from(body)))
        };
        let client = Client::new(limits::Limited(service_fn(answer)), "default");
        let pods: Api<objects::Pod> = Api::all(client);
        let events = follow_or_fail(pods, watcher::Config::default(), Ok);
        let first: Vec<_> = events.take(4).collect().await;
        assert!(
            matches!(
                first.as_slice(),
                [
                    Ok(watcher::Event::Init),
                    Err(_),
                    Ok(watcher::Event::Init),
                    Ok(watcher::Event::InitDone)
                ]
            ),
            "{first:?}"
        );
    }

    #[tokio::test]
    async fn what_is_refused_ends_the_list_for_some_minutes() {
        let mut left = 3;
        let read = |_| {
            left -= 1;
            (left > 0)
                .then_some(())
                .ok_or_else(|| "too many".to_owned())
        };
        let pods = endless_list(r#"{"metadata": {"name": "web"}}"#);
        let mut reading = Reading::new(pods, watcher::Config::default(), read);
        for expected in [Ok(()), Ok(()), Err("too many".to_owned())] {
            assert_eq!(reading.next().await, Some(expected));
        }
        assert_eq!(reading.pause, REFUSED_PAUSE);
    }
}
