//! What is done to the Secrets, one thing at a time.

use std::collections::BTreeMap;

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Client, api::ObjectMeta};
use tokio::sync::watch;

use crate::{
    ca::{
        authority::IssuedRecord,
        store::{Kept, StoreError, record},
    },
    kubernetes::{Fault, Objects},
};

/// Names the CA that a Secret is part of.
pub const STATE_LABEL: &str = "auth-daemon.io/ca-state";
const PART_LABEL: &str = "auth-daemon.io/ca-part";
const CORE: &str = "core";
const ISSUED: &str = "issued";
/// Says who wrote last, and that writer's count.
const WRITTEN: &str = "auth-daemon.io/written";
const FORMAT: &str = "format";
const SEGMENTS: &str = "segments";
const FORMAT_1: &[u8] = b"1";

/// Longest core, in bytes. A Secret holds 1 MiB.
const MAX_CORE_BYTES: usize = (1 << 20) - (16 << 10);
/// From here on the log says that the core gets long.
const LONG_CORE_BYTES: usize = MAX_CORE_BYTES / 4 * 3;
/// When a segment is full, in bytes. Each commit writes one whole, so they are small.
const SEGMENT_BYTES: usize = 64 << 10;
/// How often one write is tried when others, or late answers, come between.
const ATTEMPTS: usize = 5;

/// Reads and writes.
pub(super) struct Worker {
    secrets: Objects<Secret>,
    namespace: String,
    name: String,
    writer: String,
    writes: u64,
    lost: watch::Sender<bool>,
    state: Option<State>,
}

/// What is in the Secrets, as far as writing needs it.
#[derive(Default)]
struct State {
    core: Option<Core>,
    /// When the last certificate of a full segment ends, by the segment's number.
    sealed: BTreeMap<u32, u64>,
    open: Option<Open>,
    /// The core counts it, but it is not made yet.
    announced: Option<u32>,
}

struct Core {
    version: String,
    bytes: Vec<u8>,
    /// The number of the next segment.
    next: u32,
}

/// The segment that grows.
struct Open {
    number: u32,
    version: String,
    bytes: Vec<u8>,
    last_end: u64,
}

impl Worker {
    pub(super) fn new(
        client: Client,
        namespace: &str,
        name: &str,
        lost: watch::Sender<bool>,
    ) -> Self {
        Self {
            secrets: Objects::of(client, namespace),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            writer: format!("{:032x}", rand::random::<u128>()),
            writes: 0,
            lost,
            state: None,
        }
    }

    pub(super) async fn load(&mut self) -> Result<Option<Kept>, StoreError> {
        self.state = None;
        if *self.lost.borrow() {
            return Err(self.superseded());
        }
        let Some(core) = self.take_core().await? else {
            if let Some(number) = self.segments().await?.keys().next() {
                return Err(self.error(
                    &self.segment_name(*number),
                    "is there, but the CA's own Secret is not: restore that one, or, to begin with a new root, delete \
                     all that are labelled like this one",
                ));
            }
            self.state = Some(State::default());
            return Ok(None);
        };
        let mut segments = self.segments().await?;
        if let Some((&number, _)) = segments.range(core.next..).next() {
            return Err(self.error(
                &self.segment_name(number),
                "is newer than the CA's own Secret, of which an old state must have been restored: delete the newer \
                 segments, and revoke what was issued since",
            ));
        }
        let mut state = State::default();
        let mut issued = Vec::new();
        let first = segments.keys().next().copied();
        if let Some(last) = core.next.checked_sub(1) {
            for number in first.unwrap_or(last)..last {
                if !segments.contains_key(&number) {
                    tracing::error!(
                        secret = self.full_name(&self.segment_name(number)),
                        "a Secret with records of issued certificates is gone: these cannot be revoked by node, and \
                         a rotation of the root does not wait for them"
                    );
                }
            }
            let (open, records) = self.take_segment(last, segments.remove(&last)).await?;
            state.open = Some(open);
            issued = records;
        }
        for (number, secret) in segments {
            let records = self.decode(number, &data(&secret, ISSUED))?;
            state.sealed.insert(number, last_end(&records));
            issued.extend(records);
        }
        let kept = Kept {
            core: core.bytes.clone(),
            issued,
        };
        state.core = Some(core);
        self.state = Some(state);
        Ok(Some(kept))
    }

    /// Reads the core, and becomes its writer.
    async fn take_core(&mut self) -> Result<Option<Core>, StoreError> {
        let name = self.name.clone();
        for _ in 0..ATTEMPTS {
            let Some(found) = self.read(&name).await? else {
                return Ok(None);
            };
            if label(&found, PART_LABEL) != CORE || label(&found, STATE_LABEL) != self.name {
                return Err(self.error(
                    &name,
                    "is not the state of this CA: give the CA another name for its Secrets",
                ));
            }
            let next = String::from_utf8(data(&found, SEGMENTS))
                .ok()
                .and_then(|text| text.parse().ok());
            let (FORMAT_1, Some(next)) = (data(&found, FORMAT).as_slice(), next) else {
                return Err(self.error(
                    &name,
                    "is damaged, or of another version of the CA: restore it, or run that version",
                ));
            };
            let bytes = data(&found, CORE);
            let content = core_content(&bytes, next);
            let stamp = self.stamp();
            let secret = self.secret(&name, CORE, content, &stamp, Some(version(&found)));
            if let Some(version) = self.try_replace(&name, &secret).await? {
                return Ok(Some(Core {
                    version,
                    bytes,
                    next,
                }));
            }
        }
        Err(self.error(&name, "is written by another CA all the time"))
    }

    /// Reads the growing segment, or makes it where its writer did not come to it, and becomes its writer.
    async fn take_segment(
        &mut self,
        number: u32,
        mut listed: Option<Secret>,
    ) -> Result<(Open, Vec<IssuedRecord>), StoreError> {
        let name = self.segment_name(number);
        for _ in 0..ATTEMPTS {
            let found = match listed.take() {
                Some(found) => Some(found),
                None => self.read(&name).await?,
            };
            let (bytes, known) = match &found {
                Some(found) => (data(found, ISSUED), Some(version(found))),
                None => (Vec::new(), None),
            };
            let records = self.decode(number, &bytes)?;
            let stamp = self.stamp();
            let secret = self.secret(&name, ISSUED, issued_content(&bytes), &stamp, known.clone());
            let version = match known {
                Some(_) => self.try_replace(&name, &secret).await?,
                None => self.try_create(&name, &secret).await?,
            };
            if let Some(version) = version {
                let open = Open {
                    number,
                    version,
                    bytes,
                    last_end: last_end(&records),
                };
                return Ok((open, records));
            }
        }
        Err(self.error(&name, "is written by another CA all the time"))
    }

    async fn try_replace(&self, name: &str, secret: &Secret) -> Result<Option<String>, StoreError> {
        self.unless_conflict(name, self.secrets.replace(name, secret).await)
    }

    async fn try_create(&self, name: &str, secret: &Secret) -> Result<Option<String>, StoreError> {
        self.unless_conflict(name, self.secrets.create(secret).await)
    }

    /// The new resource version; `None` where somebody was faster, or where it is not known who was.
    fn unless_conflict(
        &self,
        name: &str,
        outcome: Result<Secret, Fault>,
    ) -> Result<Option<String>, StoreError> {
        match outcome {
            Ok(stored) => Ok(Some(version(&stored))),
            Err(fault) if fault.is_conflict() || fault.is_uncertain() => Ok(None),
            Err(fault) => Err(self.error(name, &format!("cannot be written: {fault}"))),
        }
    }

    /// All segments, by number.
    async fn segments(&self) -> Result<BTreeMap<u32, Secret>, StoreError> {
        let labels = format!("{STATE_LABEL}={},{PART_LABEL}={ISSUED}", self.name);
        let listed = self.secrets.list(&labels).await.map_err(|fault| {
            StoreError(format!(
                "Secrets of namespace {}: cannot be listed: {fault}",
                self.namespace
            ))
        })?;
        let prefix = format!("{}-{ISSUED}-", self.name);
        let numbered = listed.into_iter().filter_map(|secret| {
            let name = secret.metadata.name.as_deref()?;
            let number = name.strip_prefix(&prefix)?.parse().ok()?;
            Some((number, secret))
        });
        Ok(numbered.collect())
    }

    pub(super) async fn keep(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        if bytes.len() > MAX_CORE_BYTES {
            return Err(self.error(
                &self.name,
                &format!(
                    "would hold {} bytes of at most {MAX_CORE_BYTES}: take back revocations that are not needed any \
                     more, or revoke identities and nodes instead of serials",
                    bytes.len()
                ),
            ));
        }
        if bytes.len() > LONG_CORE_BYTES {
            tracing::warn!(
                secret = self.full_name(&self.name),
                bytes = bytes.len(),
                most = MAX_CORE_BYTES,
                "the CA's Secret gets long; take back revocations that are not needed any more"
            );
        }
        let next = self.loaded()?.core.as_ref().map_or(0, |core| core.next);
        self.write_core(bytes, next).await
    }

    async fn write_core(&mut self, bytes: Vec<u8>, next: u32) -> Result<(), StoreError> {
        let known = self
            .loaded()?
            .core
            .as_ref()
            .map(|core| core.version.clone());
        let name = self.name.clone();
        let content = core_content(&bytes, next);
        let version = self.write(&name, CORE, content, known).await?;
        self.loaded()?.core = Some(Core {
            version,
            bytes,
            next,
        });
        Ok(())
    }

    pub(super) async fn record(&mut self, records: &[IssuedRecord]) -> Result<(), StoreError> {
        let mut chunk = Vec::new();
        let mut chunk_end = 0;
        let mut one = Vec::new();
        for issued in records {
            one.clear();
            record::encode(issued, &mut one).ok_or_else(|| {
                StoreError(format!(
                    "{}: a name is too long to be kept",
                    issued.identity
                ))
            })?;
            let held = self
                .loaded()?
                .open
                .as_ref()
                .map_or(0, |open| open.bytes.len());
            if held + chunk.len() + one.len() > SEGMENT_BYTES {
                self.append(std::mem::take(&mut chunk), chunk_end).await?;
                self.seal()?;
                chunk_end = 0;
            }
            chunk.extend(&one);
            chunk_end = issued.not_after.max(chunk_end);
        }
        self.append(chunk, chunk_end).await
    }

    fn seal(&mut self) -> Result<(), StoreError> {
        let state = self.loaded()?;
        if let Some(open) = state.open.take() {
            state.sealed.insert(open.number, open.last_end);
        }
        Ok(())
    }

    /// Adds encoded records to the growing segment, beginning one where there is none.
    async fn append(&mut self, chunk: Vec<u8>, chunk_end: u64) -> Result<(), StoreError> {
        if chunk.is_empty() {
            return Ok(());
        }
        let state = self.loaded()?;
        let (number, known, mut bytes, last_end) = match &state.open {
            Some(open) => {
                let known = Some(open.version.clone());
                (open.number, known, open.bytes.clone(), open.last_end)
            }
            None => (self.announce().await?, None, Vec::new(), 0),
        };
        bytes.extend(chunk);
        let name = self.segment_name(number);
        let content = issued_content(&bytes);
        let version = self.write(&name, ISSUED, content, known).await?;
        let state = self.loaded()?;
        state.announced = None;
        state.open = Some(Open {
            number,
            version,
            bytes,
            last_end: last_end.max(chunk_end),
        });
        Ok(())
    }

    /// Counts the next segment in the core before it is made: who is no writer of the core any more makes none.
    async fn announce(&mut self) -> Result<u32, StoreError> {
        let state = self.loaded()?;
        if let Some(number) = state.announced {
            return Ok(number);
        }
        let core = state.core.as_ref();
        let (bytes, number) = core
            .map(|core| (core.bytes.clone(), core.next))
            .ok_or_else(|| StoreError("nothing can be issued before there is a root".into()))?;
        self.write_core(bytes, number + 1).await?;
        self.loaded()?.announced = Some(number);
        Ok(number)
    }

    pub(super) async fn prune(&mut self, now: u64) -> Result<(), StoreError> {
        // From the oldest on, so that a gap in the numbers means a loss.
        while let Some((&number, &last_end)) = self.loaded()?.sealed.first_key_value() {
            if last_end >= now {
                break;
            }
            let name = self.segment_name(number);
            let deleted = self.secrets.delete(&name, None).await;
            deleted.map_err(|fault| self.error(&name, &format!("cannot be deleted: {fault}")))?;
            self.loaded()?.sealed.remove(&number);
        }
        Ok(())
    }

    /// Makes the Secret, or replaces the one with the `known` resource version. Returns its new one.
    async fn write(
        &mut self,
        name: &str,
        part: &str,
        content: BTreeMap<String, ByteString>,
        mut known: Option<String>,
    ) -> Result<String, StoreError> {
        if *self.lost.borrow() {
            return Err(self.superseded());
        }
        let stamp = self.stamp();
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let secret = self.secret(name, part, content.clone(), &stamp, known.clone());
            let outcome = match known {
                Some(_) => self.secrets.replace(name, &secret).await,
                None => self.secrets.create(&secret).await,
            };
            let fault = match outcome {
                Ok(stored) => return Ok(version(&stored)),
                Err(fault) => fault,
            };
            let look = fault.is_conflict() || fault.is_uncertain() || fault.is_not_found();
            if !look {
                return Err(self.error(name, &format!("cannot be written: {fault}")));
            }
            last = Some(fault);
            let found = self.read(name).await?;
            match self.compare(found.as_ref(), &stamp, known.as_deref()) {
                Standing::Written(version) => return Ok(version),
                Standing::Ours(version) => known = version,
                Standing::Others => {
                    self.lost.send_replace(true);
                    return Err(self.superseded());
                }
            }
        }
        let last = last.map(|fault| fault.to_string()).unwrap_or_default();
        Err(self.error(name, &format!("cannot be written: {last}")))
    }

    /// Where a write stands whose answer did not say.
    fn compare(&self, found: Option<&Secret>, stamp: &str, known: Option<&str>) -> Standing {
        let Some(found) = found else {
            // Not made yet; or deleted under our hands, which nobody but an operator does.
            return match known {
                None => Standing::Ours(None),
                Some(_) => Standing::Others,
            };
        };
        let written = found.metadata.annotations.as_ref();
        let written = written.and_then(|all| all.get(WRITTEN)).map_or("", |by| by);
        let version = version(found);
        if written == stamp {
            Standing::Written(version)
        } else if known == Some(&version) || written.starts_with(&self.writer) {
            // Not done; or an earlier write of ours, given up, came late.
            Standing::Ours(Some(version))
        } else {
            Standing::Others
        }
    }

    async fn read(&self, name: &str) -> Result<Option<Secret>, StoreError> {
        let read = self.secrets.get(name).await;
        read.map_err(|fault| self.error(name, &format!("cannot be read: {fault}")))
    }

    fn secret(
        &self,
        name: &str,
        part: &str,
        content: BTreeMap<String, ByteString>,
        stamp: &str,
        known: Option<String>,
    ) -> Secret {
        let labels = [
            ("app.kubernetes.io/managed-by", "auth-daemon"),
            (STATE_LABEL, &self.name),
            (PART_LABEL, part),
        ];
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(self.namespace.clone()),
                labels: Some(labels.map(own).into()),
                annotations: Some([own((WRITTEN, stamp))].into()),
                resource_version: known,
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".into()),
            data: Some(content),
            ..Secret::default()
        }
    }

    fn stamp(&mut self) -> String {
        self.writes += 1;
        format!("{}-{}", self.writer, self.writes)
    }

    fn loaded(&mut self) -> Result<&mut State, StoreError> {
        let unread = || StoreError("the CA's state has not been read".into());
        self.state.as_mut().ok_or_else(unread)
    }

    fn decode(&self, number: u32, bytes: &[u8]) -> Result<Vec<IssuedRecord>, StoreError> {
        record::read(bytes).map_err(|error| {
            self.error(
                &self.segment_name(number),
                &format!("{error}: restore it, or delete it and revoke what was issued since its creation"),
            )
        })
    }

    fn segment_name(&self, number: u32) -> String {
        format!("{}-{ISSUED}-{number}", self.name)
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    fn error(&self, name: &str, what: &str) -> StoreError {
        StoreError(format!("Secret {}: {what}", self.full_name(name)))
    }

    fn superseded(&self) -> StoreError {
        self.error(
            &self.name,
            "has been written or deleted by somebody else: this CA's state is out of date, and it writes no more",
        )
    }
}

/// What a Secret says of an earlier attempt to write it.
enum Standing {
    /// It was done; this is the resource version.
    Written(String),
    /// It was not, and nobody else has written: to be tried on this resource version.
    Ours(Option<String>),
    /// Somebody else has written.
    Others,
}

fn core_content(core: &[u8], segments: u32) -> BTreeMap<String, ByteString> {
    [
        (CORE, core.to_vec()),
        (FORMAT, FORMAT_1.to_vec()),
        (SEGMENTS, segments.to_string().into_bytes()),
    ]
    .map(|(key, value)| (key.to_owned(), ByteString(value)))
    .into()
}

fn issued_content(records: &[u8]) -> BTreeMap<String, ByteString> {
    [(ISSUED.to_owned(), ByteString(records.to_vec()))].into()
}

fn data(secret: &Secret, key: &str) -> Vec<u8> {
    let found = secret.data.as_ref().and_then(|data| data.get(key));
    found.map(|bytes| bytes.0.clone()).unwrap_or_default()
}

fn label<'a>(secret: &'a Secret, key: &str) -> &'a str {
    let labels = secret.metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(key))
        .map_or("", |value| value)
}

fn version(secret: &Secret) -> String {
    secret.metadata.resource_version.clone().unwrap_or_default()
}

fn last_end(records: &[IssuedRecord]) -> u64 {
    records
        .iter()
        .map(|record| record.not_after)
        .max()
        .unwrap_or(0)
}
