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
        let mut before = None;
        loop {
            before = self.read_again(file, before);
            sleep(READ_INTERVAL).await;
        }
    }

    /// Reads `file`, and takes its bundle unless it holds what it held `before`. Returns what to pass the next time.
    fn read_again(&self, file: &Path, before: Option<Seen>) -> Option<Seen> {
        let content = read(file, MAX_BYTES as u64);
        match (content, before) {
            (Ok(content), Some(before)) if content == before.content => {
                if before.is_taken {
                    self.federated.confirm(self.name, self.entry);
                }
                Some(before)
            }
            (Ok(content), _) => {
                let is_taken = self.take(named(parse(&content), file));
                Some(Seen { content, is_taken })
            }
            (Err(error), _) => {
                if error.kind() == io::ErrorKind::NotFound {
                    self.federated.withdraw(self.name, self.entry);
                }
                self.take(named(Err(error), file));
                None
            }
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

/// What a file held when it was last read.
struct Seen {
    content: Vec<u8>,
    /// Whether that is a bundle, and not older than the known one.
    is_taken: bool,
}

fn named(bundle: io::Result<Bundle>, file: &Path) -> Result<Bundle, String> {
    bundle.map_err(|error| format!("{}: {error}", file.display()))
}

fn of_file(file: &Path) -> io::Result<Bundle> {
    parse(&read(file, MAX_BYTES as u64)?)
}

fn parse(content: &[u8]) -> io::Result<Bundle> {
    Bundle::of_file(content).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::SystemTime};

    use auth_tunnel::tls::trust::{Trust, TrustBundle, TrustStore};

    use super::*;
    use crate::{
        config::{Federation, ForeignDomain},
        federation::DomainStatus,
    };

    #[tokio::test]
    async fn an_unchanged_file_is_not_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("far.json");
        let federated = Arc::new(Federated::new(Arc::new(TrustStore::new(Trust::fixed(
            TrustBundle {
                trust_domain: "own.example".parse().unwrap(),
                roots: vec![],
            },
        )))));
        // Its own follower does not run in this test.
        federated.apply(&Federation::new(vec![ForeignDomain {
            trust_domain: "far.example".parse().unwrap(),
            source: BundleSource::File(file.clone()),
        }]));
        let follower = Follower {
            federated: &federated,
            name: "far.example",
            entry: 1,
        };
        let status = || -> DomainStatus { federated.list().remove(0) };
        let document = |sequence: u64| {
            format!(r#"{{"keys": [], "spiffe_sequence": {sequence}, "spiffe_refresh_hint": 60}}"#)
        };

        fs::write(&file, "neither").unwrap();
        let seen = follower.read_again(&file, None);
        let seen = follower.read_again(&file, seen);
        assert_eq!((status().failures, status().refreshed_at), (1, 0));

        fs::write(&file, document(4)).unwrap();
        let start = SystemTime::now();
        let seen = follower.read_again(&file, seen);
        let seen = follower.read_again(&file, seen);
        assert_eq!((status().sequence, status().error), (Some(4), None));
        let refreshed = federated.refreshed("far.example");
        assert!(refreshed.is_some_and(|at| at >= start));
        let seen = follower.read_again(&file, seen);
        assert!(
            federated.refreshed("far.example") > refreshed,
            "still current"
        );

        // After it was away, the same content is a bundle again.
        fs::remove_file(&file).unwrap();
        let seen = follower.read_again(&file, seen);
        assert_eq!((status().sequence, status().failures), (None, 2));
        fs::write(&file, document(4)).unwrap();
        follower.read_again(&file, seen);
        assert_eq!(status().sequence, Some(4));
    }
}
