//! The CA's state in a Secret.
//!
//! Every write names the resource version that this writer knows. [`Store::load`] writes the Secret anew, under the name
//! of a new writer. An earlier writer then holds a stale resource version: its writes fail, and it reports that another
//! CA is active.

use std::{collections::BTreeMap, time::Duration};

use auth_kubernetes::{ApiError, Objects};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Client, api::ObjectMeta};
use tokio::{
    sync::{Mutex, watch},
    time::timeout,
};

use super::{Store, StoreError, Stored};

/// On the Secret, with the CA's name.
pub const STATE_LABEL: &str = "auth-daemon.io/ca-state";
const PART_LABEL: &str = "auth-daemon.io/ca-part";
/// The only part. Earlier versions had others.
const STATE: &str = "core";
/// Says who wrote last, and that writer's count.
const WRITTEN: &str = "auth-daemon.io/written";
const FORMAT: &str = "format";

/// Largest state, in bytes. A Secret holds 1 MiB.
const MAX_BYTES: usize = (1 << 20) - (16 << 10);
/// From this size on, the log warns.
const LARGE_BYTES: usize = MAX_BYTES / 4 * 3;
/// Attempts of one write that others' writes or late answers interrupt.
const ATTEMPTS: usize = 5;
/// How long one operation may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// Keeps the CA's state in a Secret.
#[derive(Debug)]
pub struct SecretStore {
    secrets: Objects<Secret>,
    namespace: String,
    name: String,
    writer: String,
    known: Mutex<Known>,
    lost: watch::Sender<bool>,
}

/// What this writer knows of the Secret. Held during a write: writes follow one another.
#[derive(Debug, Default)]
struct Known {
    loaded: bool,
    /// Its resource version; `None` if there is no Secret yet.
    version: Option<String>,
    writes: u64,
}

impl SecretStore {
    /// Keeps the state in Secret `name` of `namespace`. Does nothing until [`Store::load`].
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self {
            secrets: Objects::of(client, namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            writer: format!("{:032x}", rand::random::<u128>()),
            known: Mutex::default(),
            lost: watch::Sender::new(false),
        }
    }

    /// Becomes true when another CA has written: this store never writes again.
    pub fn lost(&self) -> watch::Receiver<bool> {
        self.lost.subscribe()
    }

    async fn become_writer(&self) -> Result<Stored, StoreError> {
        let mut known = self.known.lock().await;
        if *self.lost.borrow() {
            return Err(self.superseded());
        }
        // Until the deadline: an earlier writer may write in between, but not all the time.
        loop {
            let Some(found) = self.read().await? else {
                known.loaded = true;
                known.version = None;
                return Ok(Stored::Nothing);
            };
            if label(&found, PART_LABEL) != STATE || label(&found, STATE_LABEL) != self.name {
                return Err(self.error(
                    "is not the state of this CA: give the CA another name for its Secret (kubernetes.stateSecret)",
                ));
            }
            let bytes = match (data(&found, FORMAT).as_slice(), data(&found, STATE)) {
                (b"1" | b"2", bytes) if !bytes.is_empty() => bytes,
                _ => {
                    return Err(self.error(
                        "is damaged, or of another version of the CA: restore it, or run that version",
                    ));
                }
            };
            if data(&found, FORMAT) == b"1" {
                tracing::info!(
                    secret = self.full_name(),
                    "state of an earlier version: Secrets labelled auth-daemon.io/ca-part=issued can be deleted"
                );
            }
            // Unchanged: the authority decides whether it can read this, before it writes its own format.
            let secret = Secret {
                metadata: self.metadata(&self.stamp(&mut known), Some(version(&found))),
                ..found
            };
            match self.secrets.replace(&self.name, &secret).await {
                Ok(stored) => {
                    known.loaded = true;
                    known.version = Some(version(&stored));
                    return Ok(Stored::State(bytes));
                }
                Err(error) if error.is_conflict() || error.is_uncertain() => {}
                Err(error) => return Err(self.error(&format!("cannot be written: {error}"))),
            }
        }
    }

    async fn write(&self, state: &[u8]) -> Result<(), StoreError> {
        if state.len() > MAX_BYTES {
            return Err(self.error(&format!(
                "would hold {} bytes of at most {MAX_BYTES}: withdraw revocations that are not needed any more, or \
                 revoke identities and nodes instead of serial numbers",
                state.len()
            )));
        }
        if state.len() > LARGE_BYTES {
            tracing::warn!(
                secret = self.full_name(),
                bytes = state.len(),
                most = MAX_BYTES,
                "the CA's Secret becomes large: withdraw revocations that are not needed any more"
            );
        }
        let mut known = self.known.lock().await;
        if !known.loaded {
            return Err(StoreError("the CA's state has not been read".into()));
        }
        if *self.lost.borrow() {
            return Err(self.superseded());
        }
        let stamp = self.stamp(&mut known);
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let secret = self.secret(state, &stamp, known.version.clone());
            let outcome = match known.version {
                Some(_) => self.secrets.replace(&self.name, &secret).await,
                None => self.secrets.create(&secret).await,
            };
            let error = match outcome {
                Ok(stored) => {
                    known.version = Some(version(&stored));
                    return Ok(());
                }
                Err(error) => error,
            };
            if !(error.is_conflict() || error.is_uncertain() || error.is_not_found()) {
                return Err(self.error(&format!("cannot be written: {error}")));
            }
            last = Some(error);
            match self.compare(self.read().await?, &stamp, known.version.as_deref()) {
                Outcome::Written(version) => {
                    known.version = Some(version);
                    return Ok(());
                }
                Outcome::NotWritten(version) => known.version = version,
                Outcome::Superseded => {
                    self.lost.send_replace(true);
                    return Err(self.superseded());
                }
            }
        }
        let last = last.map(|error| error.to_string()).unwrap_or_default();
        Err(self.error(&format!("cannot be written: {last}")))
    }

    /// What became of a write whose answer did not say so.
    fn compare(&self, found: Option<Secret>, stamp: &str, known: Option<&str>) -> Outcome {
        let Some(found) = found else {
            // Not created yet, or deleted while this writer used it, which only an operator does.
            return match known {
                None => Outcome::NotWritten(None),
                Some(_) => Outcome::Superseded,
            };
        };
        let annotations = found.metadata.annotations.as_ref();
        let written = annotations.and_then(|all| all.get(WRITTEN));
        let written = written.map_or("", |by| by);
        let version = version(&found);
        if written == stamp {
            Outcome::Written(version)
        } else if known == Some(&version) || written.starts_with(&self.writer) {
            // Or an earlier write of this writer, given up, arrived late.
            Outcome::NotWritten(Some(version))
        } else {
            Outcome::Superseded
        }
    }

    async fn read(&self) -> Result<Option<Secret>, StoreError> {
        let read: Result<_, ApiError> = self.secrets.get(&self.name).await;
        read.map_err(|error| self.error(&format!("cannot be read: {error}")))
    }

    fn secret(&self, state: &[u8], stamp: &str, known: Option<String>) -> Secret {
        let content = [(STATE, state.to_vec()), (FORMAT, b"2".to_vec())];
        let content = content.map(|(key, value)| (key.to_owned(), ByteString(value)));
        Secret {
            metadata: self.metadata(stamp, known),
            type_: Some("Opaque".into()),
            data: Some(content.into()),
            ..Secret::default()
        }
    }

    fn metadata(&self, stamp: &str, known: Option<String>) -> ObjectMeta {
        let labels = [
            ("app.kubernetes.io/managed-by", "auth-daemon"),
            (STATE_LABEL, &self.name),
            (PART_LABEL, STATE),
        ];
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        ObjectMeta {
            name: Some(self.name.clone()),
            namespace: Some(self.namespace.clone()),
            labels: Some(labels.map(own).into()),
            annotations: Some(BTreeMap::from([own((WRITTEN, stamp))])),
            resource_version: known,
            ..ObjectMeta::default()
        }
    }

    fn stamp(&self, known: &mut Known) -> String {
        known.writes += 1;
        format!("{}-{}", self.writer, known.writes)
    }

    fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn error(&self, what: &str) -> StoreError {
        StoreError(format!("Secret {}: {what}", self.full_name()))
    }

    fn superseded(&self) -> StoreError {
        self.error(
            "was written or deleted by something else: another CA is active, and this one stops writing",
        )
    }
}

/// What a Secret says of an earlier attempt to write it.
enum Outcome {
    /// The write was done; this is the resource version.
    Written(String),
    /// It was not, and nobody else has written: to be retried on this resource version.
    NotWritten(Option<String>),
    /// Another CA has written.
    Superseded,
}

#[tonic::async_trait]
impl Store for SecretStore {
    async fn load(&self) -> Result<Stored, StoreError> {
        within(self.become_writer()).await
    }

    async fn replace(&self, state: &[u8]) -> Result<(), StoreError> {
        within(self.write(state)).await
    }
}

async fn within<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let late = || StoreError(format!("the CA's Secret: not done within {DEADLINE:?}"));
    timeout(DEADLINE, work)
        .await
        .unwrap_or_else(|_| Err(late()))
}

fn data(secret: &Secret, key: &str) -> Vec<u8> {
    let found = secret.data.as_ref().and_then(|data| data.get(key));
    found.map(|bytes| bytes.0.clone()).unwrap_or_default()
}

fn label<'a>(secret: &'a Secret, key: &str) -> &'a str {
    let labels = secret.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(key)).map_or("", |v| v)
}

fn version(secret: &Secret) -> String {
    secret.metadata.resource_version.clone().unwrap_or_default()
}
