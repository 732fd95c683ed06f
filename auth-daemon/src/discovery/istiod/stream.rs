//! The subscription to istiod, over all connections that carry it.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::issuer::{Link, explain_status};
use auth_support::backoff;
use auth_xds::{
    Change, Session,
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
/// Answers that wait to be sent.
const WAITING: usize = 16;

/// What a response has changed.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) changes: Vec<Change>,
    /// Whether all resources were received once.
    pub(super) complete: bool,
}

/// Keeps the subscription until nobody wants the updates any more. After a failure, the next stream resumes with what the
/// session holds.
pub(super) async fn keep(link: Arc<Link>, mut session: Session, updates: mpsc::Sender<Update>) {
    let mut failures = 0;
    let mut logged: Option<(Instant, String)> = None;
    while !updates.is_closed() {
        let mut received = false;
        let why = follow(&link, &mut session, &updates, &mut received).await;
        if received {
            failures = 0;
        }
        let told = logged
            .as_ref()
            .is_some_and(|(at, before)| *before == why && at.elapsed() < LOG_INTERVAL);
        if !told {
            tracing::warn!(
                address = link.server.address, resources = session.count(), %why,
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
    let request = match link.request(ReceiverStream::new(requests)) {
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
    let mut responses = 0;
    loop {
        let message = match responses {
            // One of each type.
            0 | 1 => match timeout_at(deadline, stream.message()).await {
                Ok(message) => message,
                Err(_) => return late(),
            },
            _ => stream.message().await,
        };
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
        let update = Update {
            changes: taken.changes,
            complete: session.is_complete(),
        };
        if updates.send(update).await.is_err() {
            return "it is not wanted any more".into();
        }
        *received = true;
        if answers.send(taken.answer).await.is_err() {
            return "istiod takes no answers any more".into();
        }
    }
}
