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

    /// Polls `endpoint`. Until it has answered, the file `first` is read, too, and again while it fails later: so an operator can
    /// replace a bundle that does not verify the endpoint any more. What the file held while the endpoint answered is older
    /// than the answer, and does not count.
    async fn endpoint(&self, endpoint: &Endpoint, first: Option<&Path>) {
        let mut failures = 0;
        let (mut has_answered, mut seen) = (false, None);
        loop {
            if let Some(file) = first.filter(|_| !has_answered || failures > 0) {
                self.read_changed(file, &mut seen);
            }
            let trust = &self.federated.trust;
            let fetched = fetch(endpoint, |domain| trust.roots(domain.as_str())).await;
            let hint = fetched.as_ref().ok().and_then(|bundle| bundle.refresh_hint);
            let hint = hint.unwrap_or(DEFAULT_HINT).clamp(MIN_HINT, MAX_HINT);
            let pause = match self.take(fetched) {
                true => {
                    (failures, has_answered) = (0, true);
                    seen = first
                        .and_then(|file| read(file, MAX_BYTES as u64).ok())
                        .or(seen);
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

    /// Takes the bundle in `file`, unless the file holds what has been `seen`, and notes what it holds.
    fn read_changed(&self, file: &Path, seen: &mut Option<Vec<u8>>) {
        match read(file, MAX_BYTES as u64) {
            Ok(content) if seen.as_ref() == Some(&content) => {}
            Ok(content) => {
                if self.take(named(parse(&content), file)) {
                    *seen = Some(content);
                }
            }
            // A bundle that was taken stays in force.
            Err(_) if seen.is_some() => {}
            Err(error) => {
                self.take(named(Err(error), file));
            }
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

fn parse(content: &[u8]) -> io::Result<Bundle> {
    Bundle::of_file(content).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::SystemTime};

    use auth_federation::Profile;
    use auth_tunnel::tls::trust::{Trust, TrustBundle, TrustStore};

    use super::*;
    use crate::{
        config::{Federation, ForeignDomain},
        federation::DomainStatus,
    };

    fn federated() -> Arc<Federated> {
        let own = TrustBundle::of_roots("own.example".parse().unwrap(), vec![]);
        let trust = TrustStore::new(Trust::fixed(own));
        Arc::new(Federated::new(Arc::new(trust)))
    }

    fn document(sequence: u64) -> String {
        format!(r#"{{"keys": [], "spiffe_sequence": {sequence}, "spiffe_refresh_hint": 60}}"#)
    }

    #[tokio::test]
    async fn a_changed_file_counts_while_the_endpoint_fails() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("far.json");
        fs::write(&file, document(1)).unwrap();
        let federated = federated();
        federated.apply(&Federation::new(vec![ForeignDomain {
            trust_domain: "far.example".parse().unwrap(),
            source: BundleSource::Endpoint {
                endpoint: Endpoint {
                    // Nobody listens there.
                    url: "https://127.0.0.1:1/".parse().unwrap(),
                    profile: Profile::Web { root_file: None },
                },
                first: Some(file.clone()),
            },
        }]));
        for sequence in [1, 2] {
            fs::write(&file, document(sequence)).unwrap();
            let taken = async {
                while federated.list()[0].sequence != Some(sequence) {
                    sleep(Duration::from_millis(10)).await;
                }
            };
            let taken = tokio::time::timeout(Duration::from_secs(30), taken).await;
            taken.unwrap_or_else(|_| panic!("sequence {sequence} in {:?}", federated.list()));
        }
    }

    #[tokio::test]
    async fn an_unchanged_file_is_not_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("far.json");
        let federated = federated();
        // Its own follower has no turn in this test.
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
