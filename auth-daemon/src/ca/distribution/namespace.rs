//! The Secrets of one namespace, kept in step with its service accounts.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt, future::join_all};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{Api, ResourceExt, api::ObjectMeta, core::PartialObjectMeta, runtime::watcher};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use tokio::time::{Instant, sleep_until};

use super::{
    ACCOUNT_ANNOTATION, CHAIN, DISTRIBUTED_LABEL, Distribution, KEY, PREFIX, ROOTS, SECRET_TYPE,
    verdict::{Verdict, is_ours, verdict},
};
use crate::{
    ca::{
        authority::{Authority, Refusal},
        pem,
        schedule::Schedule,
    },
    kubernetes::{Fault, Objects, follow},
    mesh::Identity,
};

/// Service accounts that are looked after at the same time.
const AT_ONCE: usize = 8;
/// How often to look at a Secret although nothing says that it has changed; one that is not ours may have gone.
const LOOK: Duration = Duration::from_secs(300);

/// Keeps the Secrets of namespace `name`, for ever.
pub(super) async fn keep(settings: &Distribution, name: &str, authority: &Arc<Authority>) {
    let client = &settings.client;
    let mut accounts = Box::pin(follow(
        Api::<PartialObjectMeta<ServiceAccount>>::namespaced(client.clone(), name),
        watcher::Config::default(),
        "service accounts",
    ));
    // Of the Secrets only the names: what is in them is read when it is due.
    let labels = format!("{DISTRIBUTED_LABEL}=true");
    let mut secrets = Box::pin(follow(
        Api::<PartialObjectMeta<Secret>>::namespaced(client.clone(), name),
        watcher::Config::default().labels(&labels),
        "Secrets with certificates",
    ));
    let mut published = authority.published();
    let mut namespace = Namespace {
        settings,
        name,
        authority,
        secrets: Objects::of(client.clone(), name),
        accounts: None,
        due: Schedule::default(),
        foreign: BTreeSet::new(),
    };
    let mut listed: Option<BTreeMap<String, String>> = None;
    loop {
        let next = namespace
            .accounts
            .as_ref()
            .and_then(|_| namespace.due.next());
        tokio::select! {
            Some(event) = accounts.next() => match event {
                watcher::Event::Init => listed = Some(BTreeMap::new()),
                watcher::Event::InitApply(account) => {
                    listed.get_or_insert_default().insert(account.name_any(), account.uid().unwrap_or_default());
                }
                watcher::Event::InitDone => namespace.replace(listed.take().unwrap_or_default()),
                watcher::Event::Apply(account) => {
                    namespace.put(account.name_any(), account.uid().unwrap_or_default());
                }
                watcher::Event::Delete(account) => namespace.remove(&account.name_any()),
            },
            Some(event) = secrets.next() => {
                if let watcher::Event::Apply(secret)
                    | watcher::Event::InitApply(secret)
                    | watcher::Event::Delete(secret) = event
                    && let Some(account) = secret.name_any().strip_prefix(PREFIX)
                {
                    namespace.due.at_once(account);
                }
            }
            // New roots, or a revocation.
            Ok(()) = published.changed() => namespace.all_due(),
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                namespace.work().await;
            }
        }
    }
}

struct Namespace<'a> {
    settings: &'a Distribution,
    name: &'a str,
    authority: &'a Arc<Authority>,
    secrets: Objects<Secret>,
    /// UIDs by name; `None` before all were read.
    accounts: Option<BTreeMap<String, String>>,
    due: Schedule,
    /// Accounts whose Secret's name is taken by somebody else's; said once.
    foreign: BTreeSet<String>,
}

/// What became of an account's Secret.
enum Done {
    /// All is well until then.
    Until(SystemTime),
    /// Its name is taken.
    Foreign,
    /// It has no account, and is gone.
    Gone,
}

impl Namespace<'_> {
    fn replace(&mut self, accounts: BTreeMap<String, String>) {
        let before = self.accounts.replace(accounts).unwrap_or_default();
        for name in before.keys() {
            self.due.at_once(name);
        }
        self.all_due();
    }

    fn put(&mut self, name: String, uid: String) {
        let accounts = self.accounts.get_or_insert_default();
        if accounts.get(&name) != Some(&uid) {
            self.due.at_once(&name);
            accounts.insert(name, uid);
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(accounts) = &mut self.accounts {
            accounts.remove(name);
        }
        self.due.at_once(name);
    }

    fn all_due(&mut self) {
        for name in self.accounts.iter().flat_map(BTreeMap::keys) {
            self.due.at_once(name);
        }
    }

    /// Looks after those that are due.
    async fn work(&mut self) {
        let due = self.due.take(Instant::now(), AT_ONCE);
        let this = &*self;
        let done = join_all(due.into_iter().map(|account| async move {
            let done = this.look_after(&account).await;
            (account, done)
        }))
        .await;
        for (account, done) in done {
            match done {
                Ok(Done::Gone) => {
                    self.foreign.remove(&account);
                    self.due.forget(&account);
                }
                Ok(Done::Until(time)) => {
                    self.foreign.remove(&account);
                    let wait = time.duration_since(SystemTime::now()).unwrap_or_default();
                    self.due.after(&account, wait.min(LOOK));
                }
                Ok(Done::Foreign) => {
                    if self.foreign.insert(account.clone()) {
                        tracing::error!(
                            secret = format!("{}/{PREFIX}{account}", self.name),
                            "a Secret of this name is there and not ours: it stays as it is, and the service \
                             account gets none. Remove it, or take the namespace out of secrets.namespaces"
                        );
                    }
                    self.due.after(&account, LOOK);
                }
                Err(error) => {
                    tracing::error!(
                        secret = format!("{}/{PREFIX}{account}", self.name), %error,
                        "cannot keep a Secret with a certificate"
                    );
                    self.due.again(&account);
                }
            }
        }
    }

    async fn look_after(&self, account: &str) -> Result<Done, String> {
        let secret_name = format!("{PREFIX}{account}");
        let told = |fault: Fault| fault.to_string();
        let found = self.secrets.get(&secret_name).await.map_err(told)?;
        let accounts = self.accounts.as_ref();
        let Some(uid) = accounts.and_then(|accounts| accounts.get(account)) else {
            if let Some(secret) = found.filter(is_ours) {
                self.secrets
                    .delete(&secret_name, secret.metadata.uid)
                    .await
                    .map_err(told)?;
                tracing::info!(
                    secret = format!("{}/{secret_name}", self.name),
                    "Secret removed with its service account"
                );
            }
            return Ok(Done::Gone);
        };
        let identity = self
            .settings
            .trust_domain
            .identity(self.name, account)
            .map_err(|error| error.to_string())?;
        let published = self.authority.published().borrow().clone();
        let roots = pem::certificates(&published.roots);
        let now = SystemTime::now();
        let good = |serial: &[u8; 16]| {
            let record = self.authority.issued(serial);
            record.is_some_and(|record| self.authority.check(&record).is_ok())
        };
        let is_new = found.is_none();
        let (mut secret, why) = match found {
            None => (self.empty(account, &secret_name), Some("it is new")),
            Some(secret) => match verdict(&secret, &identity, &roots, now, good) {
                Verdict::Foreign => return Ok(Done::Foreign),
                Verdict::Keep(until) => return Ok(Done::Until(until)),
                Verdict::Roots => (secret, None),
                Verdict::Issue(why) => (secret, Some(why)),
            },
        };
        let data = secret.data.get_or_insert_default();
        if why.is_some() {
            match self.issue(&identity).await {
                Ok((chain, key)) => {
                    data.insert(CHAIN.into(), ByteString(chain.into_bytes()));
                    data.insert(KEY.into(), ByteString(key.into_bytes()));
                }
                // Nobody is to take the old one for good.
                Err(Refusal::Revoked(revoked)) => {
                    if !is_new {
                        self.secrets
                            .delete(&secret_name, secret.metadata.uid)
                            .await
                            .map_err(told)?;
                        tracing::warn!(
                            secret = format!("{}/{secret_name}", self.name),
                            "Secret removed: {revoked}"
                        );
                    }
                    return Ok(Done::Until(now + LOOK));
                }
                Err(refusal) => return Err(refusal.to_string()),
            }
        }
        data.insert(ROOTS.into(), ByteString(roots.clone().into_bytes()));
        secret.metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".into(),
            kind: "ServiceAccount".into(),
            name: account.to_owned(),
            uid: uid.clone(),
            ..OwnerReference::default()
        }]);
        let written = if is_new {
            self.secrets.create(&secret).await
        } else {
            self.secrets.replace(&secret_name, &secret).await
        };
        let written = written.map_err(told)?;
        tracing::info!(
            secret = format!("{}/{secret_name}", self.name),
            why = why.unwrap_or("the roots have changed"),
            "Secret with a certificate written"
        );
        match verdict(&written, &identity, &roots, now, good) {
            Verdict::Keep(until) => Ok(Done::Until(until)),
            _ => Err("it does not hold what was written to it: somebody else changes it".into()),
        }
    }

    fn empty(&self, account: &str, secret_name: &str) -> Secret {
        let labels = [
            ("app.kubernetes.io/managed-by", "auth-daemon"),
            (DISTRIBUTED_LABEL, "true"),
        ];
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        Secret {
            metadata: ObjectMeta {
                name: Some(secret_name.to_owned()),
                namespace: Some(self.name.to_owned()),
                labels: Some(labels.map(own).into()),
                annotations: Some([own((ACCOUNT_ANNOTATION, account))].into()),
                ..ObjectMeta::default()
            },
            type_: Some(SECRET_TYPE.into()),
            ..Secret::default()
        }
    }

    async fn issue(&self, identity: &Identity) -> Result<(String, String), Refusal> {
        let unmade = |error: rcgen::Error| Refusal::State(format!("a key cannot be made: {error}"));
        let key = KeyPair::generate().map_err(unmade)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(unmade)?;
        let lifetime = self.settings.lifetime;
        let chain = self
            .authority
            .issue(identity, csr.der(), lifetime, None)
            .await?;
        Ok((pem::certificates(&chain), key.serialize_pem()))
    }
}
