//! Follows the source of one bundle.

use std::{io, path::Path, sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{Federated, READ_INTERVAL, read};
use crate::config::BundleSource;
use auth_federation::{Bundle, Endpoint, MAX_BYTES, fetch};
use auth_support::backoff;

/// Between polls of an endpoint whose bundle has no refresh hint (SPIFFE Federation §4.1).
const DEFAULT_HINT: Duration = Duration::from_secs(5 * 60);
/// Shortest and longest refresh hint that are followed. All nodes poll, and a bundle must not get too old.
const MIN_HINT: Duration = Duration::from_secs(1);
const MAX_HINT: Duration = Duration::from_secs(60 * 60);
/// Between attempts after failures.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Keeps the bundle of `entry` for the trust domain `name` current, until the task is aborted.
pub(super) async fn follow(
    federated: Arc<Federated>,
    name: String,
    entry: u64,
    source: BundleSource,
) {
    let follower = Follower {
        federated: &federated,
        name: &name,
        entry,
    };
    match &source {
        BundleSource::File(file) => follower.file(file).await,
        BundleSource::Endpoint { endpoint, first } => {
            follower.endpoint(endpoint, first.as_deref()).await;
        }
    }
}

struct Follower<'a> {
    federated: &'a Federated,
    name: &'a str,
    entry: u64,
}

impl Follower<'_> {
    async fn file(&self, file: &Path) {
        loop {
            let bundle = of_file(file);
            if matches!(&bundle, Err(error) if error.kind() == io::ErrorKind::NotFound) {
                self.federated.withdraw(self.name, self.entry);
            }
            self.take(named(bundle, file));
            sleep(READ_INTERVAL).await;
        }
    }

    /// Polls `endpoint`. Until the file `first` has been read or the endpoint has answered, the file is read, too.
    async fn endpoint(&self, endpoint: &Endpoint, mut first: Option<&Path>) {
        let mut failures = 0;
        loop {
            first = first.filter(|file| !self.take(named(of_file(file), file)));
            let trust = &self.federated.trust;
            let fetched = fetch(endpoint, |domain| trust.roots(domain.as_str())).await;
            let hint = fetched.as_ref().ok().and_then(|bundle| bundle.refresh_hint);
            let hint = hint.unwrap_or(DEFAULT_HINT).clamp(MIN_HINT, MAX_HINT);
            let pause = match self.take(fetched) {
                true => {
                    (failures, first) = (0, None);
                    // Not all nodes at once.
                    hint.mul_f64(1.0 - 0.1 * rand::random::<f64>())
                }
                false => {
                    let pause = backoff::pause(RETRY, MAX_RETRY, failures, rand::random());
                    failures += 1;
                    pause
                }
            };
            sleep(pause).await;
        }
    }

    /// Takes what the source has. Returns whether that is a bundle.
    fn take(&self, bundle: Result<Bundle, String>) -> bool {
        let taken = bundle.and_then(|bundle| self.federated.take(self.name, self.entry, bundle));
        let Err(error) = taken else {
            return true;
        };
        if self.federated.failed(self.name, self.entry, &error) {
            tracing::error!(
                trust_domain = self.name,
                error,
                "bundle of a foreign trust domain cannot be read; keeping the known one, if there is one"
            );
        }
        false
    }
}

fn named(bundle: io::Result<Bundle>, file: &Path) -> Result<Bundle, String> {
    bundle.map_err(|error| format!("{}: {error}", file.display()))
}

fn of_file(file: &Path) -> io::Result<Bundle> {
    let content = read(file, MAX_BYTES as u64)?;
    Bundle::of_file(&content).map_err(io::Error::other)
}
