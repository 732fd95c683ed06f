//! The subscription to istiod, over all connections that carry it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, interval, sleep, sleep_until, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    issuer::{Link, explain_status},
    proxy::lookups::Lookups,
};
use auth_support::backoff;
use auth_xds::{
    Answer, Change, Session,
    discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};

/// Largest response that is read, in bytes. The first one holds all resources of its type: a few hundred bytes each.
const MAX_RESPONSE: usize = 256 << 20;
/// Until istiod has sent all resources. A control plane that has just started reads the cluster first.
const FIRST_RESPONSES: Duration = Duration::from_secs(60);
/// A dead connection is detected within two of these. istiod closes a connection that pings more often than every 15 s.
const PING: Duration = Duration::from_secs(20);
/// Between attempts. The maximum is also what a node waits for a policy after istiod is back.
const RETRY: Duration = Duration::from_millis(250);
const MAX_RETRY: Duration = Duration::from_secs(10);
/// How often the same failure is logged, at most.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Until istiod has answered what it was asked for. Connections do not wait that long.
const ANSWER: Duration = Duration::from_secs(30);
/// How often what is not used any more is looked for.
const RELEASE: Duration = Duration::from_secs(5);
/// Answers that wait to be sent.
const WAITING: usize = 16;

/// What a response has changed.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) changes: Vec<Change>,
    /// Whether all resources were received once.
    pub(super) complete: bool,
    /// What has the addresses that were asked for, now that the changes are known.
    pub(super) answered: Vec<(IpAddr, Answer)>,
}

/// Keeps the subscription until the receiver of the updates is dropped. After a failure, the next stream resumes with
/// what the session holds. A session on demand asks for what is queued in `lookups`.
pub(super) async fn keep(
    link: Arc<Link>,
    mut session: Session,
    lookups: Option<Arc<Lookups>>,
    updates: mpsc::Sender<Update>,
) {
    let mut failures = 0;
    let mut logged: Option<(Instant, String)> = None;
    while !updates.is_closed() {
        let mut received = false;
        let why = follow(
            &link,
            &mut session,
            lookups.as_deref(),
            &updates,
            &mut received,
        )
        .await;
        if received {
            failures = 0;
        }
        let is_logged = logged
            .as_ref()
            .is_some_and(|(at, before)| *before == why && at.elapsed() < LOG_INTERVAL);
        if !is_logged {
            tracing::warn!(
                address = link.address(), resources = session.count(), %why,
                "subscription to istiod ended; keeping the known state and resuming"
            );
            logged = Some((Instant::now(), why));
        }
        sleep(backoff::pause(RETRY, MAX_RETRY, failures, rand::random())).await;
        failures += 1;
    }
}

/// Applies the responses of one stream until it ends. Returns why it did.
async fn follow(
    link: &Arc<Link>,
    session: &mut Session,
    lookups: Option<&Lookups>,
    updates: &mpsc::Sender<Update>,
    received: &mut bool,
) -> String {
    let channel = link.channel(|endpoint| {
        endpoint
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
    });
    let mut client = match channel {
        Ok(channel) => AggregatedDiscoveryServiceClient::new(channel),
        Err(why) => return why,
    }
    .max_decoding_message_size(MAX_RESPONSE);
    let (answers, requests) = mpsc::channel(WAITING);
    for request in session.open() {
        // There is room.
        let _ = answers.try_send(request);
    }
    let request = match link.request(ReceiverStream::new(requests)).await {
        Ok(request) => request,
        Err(why) => return why,
    };
    let deadline = Instant::now() + FIRST_RESPONSES;
    let late = || format!("it does not send its resources within {FIRST_RESPONSES:?}");
    let mut stream = match timeout_at(deadline, client.delta_aggregated_resources(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return explain_status(&status),
        Err(_) => return late(),
    };
    let mut release = interval(RELEASE);
    let mut responses = 0;
    let mut asked = None;
    loop {
        // One of each type.
        let is_first = responses < 2;
        if session.is_waiting() {
            asked.get_or_insert_with(Instant::now);
        } else {
            asked = None;
        }
        let unanswered = asked.map_or(deadline, |asked| asked + ANSWER).max(deadline);
        let update = tokio::select! {
            message = stream.message() => {
                let response = match message {
                    Ok(Some(response)) => response,
                    Ok(None) => return "istiod has ended the stream".into(),
                    Err(status) => return explain_status(&status),
                };
                responses = (responses + 1).min(2);
                let taken = session.take(response);
                for why in &taken.rejected {
                    tracing::error!(%why, "resource of istiod rejected; its last good version stays in force");
                }
                *received = true;
                if answers.send(taken.answer).await.is_err() {
                    return "istiod takes no answers any more".into();
                }
                Some((taken.changes, taken.answered))
            }
            addresses = queued(lookups) => {
                session.ask(addresses);
                None
            }
            _ = release.tick(), if lookups.is_some() => {
                let used = lookups.map(Lookups::in_use).unwrap_or_default();
                let (changes, request) = session.release(&used);
                if let Some(request) = request && answers.send(request).await.is_err() {
                    return "istiod takes no requests any more".into();
                }
                (!changes.is_empty()).then_some((changes, Vec::new()))
            }
            () = sleep_until(deadline), if is_first => return late(),
            () = sleep_until(unanswered), if asked.is_some() => {
                return format!("it does not answer what it was asked for within {ANSWER:?}");
            }
        };
        for request in session.requests() {
            if answers.send(request).await.is_err() {
                return "istiod takes no requests any more".into();
            }
        }
        let Some((changes, answered)) = update else {
            continue;
        };
        let update = Update {
            changes,
            complete: session.is_complete(),
            answered,
        };
        if updates.send(update).await.is_err() {
            return "it is not wanted any more".into();
        }
    }
}

/// Waits for addresses to ask for.
async fn queued(lookups: Option<&Lookups>) -> Vec<IpAddr> {
    match lookups {
        Some(lookups) => lookups.queued().await,
        None => std::future::pending().await,
    }
}
