//! Reconciles the Secrets of one namespace with its service accounts.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use auth_ca_api::pem;
use auth_kubernetes::{ApiError, Objects, follow};
use auth_mesh::{Identity, TrustDomain};
use futures_util::{StreamExt, future::join_all};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{Api, Client, ResourceExt, api::ObjectMeta, core::PartialObjectMeta, runtime::watcher};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep_until};

use super::verdict::{
    CHAIN, DISTRIBUTED_LABEL, KEY, ROOTS, SECRET_TYPE, Verdict, is_ours, verdict,
};
use crate::{
    authority::{Authority, Refusal},
    schedule::Schedule,
};

/// Precedes the service account in a Secret's name.
const PREFIX: &str = "istio.";
const ACCOUNT_ANNOTATION: &str = "istio.io/service-account.name";
/// Service accounts that are reconciled at the same time.
const AT_ONCE: usize = 8;
/// How often a Secret is checked without an event. Another one under its name may be gone.
const CHECK: Duration = Duration::from_secs(300);

/// Where the Secrets are, and who signs their certificates.
pub(super) struct Issuing<'a> {
    pub(super) client: &'a Client,
    pub(super) trust_domain: &'a TrustDomain,
    pub(super) lifetime: Duration,
    pub(super) authority: &'a Authority,
}

/// Keeps the Secrets of namespace `name` up to date, for ever.
pub(super) async fn keep(issuing: &Issuing<'_>, name: &str) {
    let client = issuing.client;
    let mut accounts = Box::pin(follow(
        Api::<PartialObjectMeta<ServiceAccount>>::namespaced(client.clone(), name),
        watcher::Config::default(),
        "service accounts",
    ));
    // Only names of Secrets: their content is read when they are due.
    let labels = format!("{DISTRIBUTED_LABEL}=true");
    let mut secrets = Box::pin(follow(
        Api::<PartialObjectMeta<Secret>>::namespaced(client.clone(), name),
        watcher::Config::default().labels(&labels),
        "Secrets with certificates",
    ));
    let mut published = issuing.authority.published();
    let mut namespace = Namespace {
        issuing,
        name,
        secrets: Objects::of(client.clone(), name),
        accounts: None,
        due: Schedule::default(),
        foreign: BTreeSet::new(),
    };
    let mut listed: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let listed_once = namespace.accounts.is_some();
        let next = namespace.due.next().filter(|_| listed_once);
        let uid = |account: &PartialObjectMeta<ServiceAccount>| account.uid().unwrap_or_default();
        tokio::select! {
            Some(event) = accounts.next() => match event {
                watcher::Event::Init => listed.clear(),
                watcher::Event::InitApply(account) => {
                    listed.insert(account.name_any(), uid(&account));
                }
                watcher::Event::InitDone => namespace.replace(std::mem::take(&mut listed)),
                watcher::Event::Apply(account) => namespace.put(account.name_any(), uid(&account)),
                watcher::Event::Delete(account) => namespace.remove(&account.name_any()),
            },
            Some(event) = secrets.next() => {
                if let watcher::Event::Apply(secret)
                    | watcher::Event::InitApply(secret)
                    | watcher::Event::Delete(secret) = event
                    && let Some(account) = secret.name_any().strip_prefix(PREFIX)
                {
                    namespace.due.now(account);
                }
            }
            // New roots, or a revocation.
            Ok(()) = published.changed() => namespace.all_due(),
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                namespace.reconcile_due().await;
            }
        }
    }
}

struct Namespace<'a> {
    issuing: &'a Issuing<'a>,
    name: &'a str,
    secrets: Objects<Secret>,
    /// UIDs by name; `None` until they have been listed.
    accounts: Option<BTreeMap<String, String>>,
    due: Schedule,
    /// Accounts whose Secret's name is taken, which is logged once.
    foreign: BTreeSet<String>,
}

/// The result of reconciling one account.
enum Done {
    /// Nothing is due until this time.
    Until(SystemTime),
    /// Somebody else's Secret has the name.
    Foreign,
    /// There is neither account nor Secret.
    Gone,
}

impl Namespace<'_> {
    fn replace(&mut self, accounts: BTreeMap<String, String>) {
        let before = self.accounts.replace(accounts).unwrap_or_default();
        before.keys().for_each(|name| self.due.now(name));
        self.all_due();
    }

    fn put(&mut self, name: String, uid: String) {
        let accounts = self.accounts.get_or_insert_default();
        if accounts.get(&name) != Some(&uid) {
            self.due.now(&name);
            accounts.insert(name, uid);
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(accounts) = &mut self.accounts {
            accounts.remove(name);
        }
        self.due.now(name);
    }

    fn all_due(&mut self) {
        for name in self.accounts.iter().flat_map(BTreeMap::keys) {
            self.due.now(name);
        }
    }

    async fn reconcile_due(&mut self) {
        let due = self.due.take(Instant::now(), AT_ONCE);
        let done = join_all(due.iter().map(|account| self.reconcile(account))).await;
        for (account, done) in due.into_iter().zip(done) {
            let secret = format!("{}/{PREFIX}{account}", self.name);
            if !matches!(done, Ok(Done::Foreign)) {
                self.foreign.remove(&account);
            }
            match done {
                Ok(Done::Gone) => self.due.forget(&account),
                Ok(Done::Until(time)) => {
                    let wait = time.duration_since(SystemTime::now()).unwrap_or_default();
                    self.due.after(&account, wait.min(CHECK));
                }
                Ok(Done::Foreign) => {
                    self.due.after(&account, CHECK);
                    if self.foreign.insert(account) {
                        tracing::error!(
                            secret,
                            "Secret not created: another Secret has its name. Remove that one, or remove the namespace \
                             from secrets.namespaces"
                        );
                    }
                }
                Err(error) => {
                    tracing::error!(secret, %error, "Secret with a certificate cannot be kept");
                    self.due.failed(&account);
                }
            }
        }
    }

    async fn reconcile(&self, account: &str) -> Result<Done, String> {
        let secret_name = format!("{PREFIX}{account}");
        let full_name = format!("{}/{secret_name}", self.name);
        let text = |error: ApiError| error.to_string();
        let found = self.secrets.get(&secret_name).await.map_err(text)?;
        let accounts = self.accounts.as_ref();
        let Some(uid) = accounts.and_then(|accounts| accounts.get(account)) else {
            if let Some(secret) = found.filter(is_ours) {
                let deleted = self.secrets.delete(&secret_name, secret.metadata.uid).await;
                deleted.map_err(text)?;
                tracing::info!(
                    secret = full_name,
                    "Secret removed with its service account"
                );
            }
            return Ok(Done::Gone);
        };
        let identity = self
            .issuing
            .trust_domain
            .identity(self.name, account)
            .map_err(|error| error.to_string())?;
        let roots = pem::certificates(&self.issuing.authority.published().borrow().roots);
        let now = SystemTime::now();
        let valid = |leaf: &CertificateDer<'_>| self.issuing.authority.verify(leaf).is_ok();
        let is_new = found.is_none();
        let (mut secret, why) = match found {
            None => (self.empty(account, &secret_name), Some("it is new")),
            Some(secret) => match verdict(&secret, &identity, &roots, now, valid) {
                Verdict::Foreign => return Ok(Done::Foreign),
                Verdict::Keep(until) => return Ok(Done::Until(until)),
                Verdict::Roots => (secret, None),
                Verdict::Issue(why) => (secret, Some(why)),
            },
        };
        let data = secret.data.get_or_insert_default();
        if why.is_some() {
            match self.issue(&identity) {
                Ok((chain, key)) => {
                    data.insert(CHAIN.into(), ByteString(chain.into_bytes()));
                    data.insert(KEY.into(), ByteString(key.into_bytes()));
                }
                // A revoked identity keeps no certificate.
                Err(Refusal::Revoked(revoked)) => {
                    if !is_new {
                        let deleted = self.secrets.delete(&secret_name, secret.metadata.uid).await;
                        deleted.map_err(text)?;
                        tracing::warn!(secret = full_name, "Secret removed: {revoked}");
                    }
                    return Ok(Done::Until(now + CHECK));
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
        let written = match is_new {
            true => self.secrets.create(&secret).await,
            false => self.secrets.replace(&secret_name, &secret).await,
        };
        let written = written.map_err(text)?;
        let why = why.unwrap_or("the roots have changed");
        tracing::info!(secret = full_name, why, "Secret with a certificate written");
        match verdict(&written, &identity, &roots, now, valid) {
            Verdict::Keep(until) => Ok(Done::Until(until)),
            _ => Err("it does not contain what was written: somebody else changes it".into()),
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

    fn issue(&self, identity: &Identity) -> Result<(String, String), Refusal> {
        let failed = |error: rcgen::Error| Refusal::State(format!("no key can be made: {error}"));
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(failed)?;
        let lifetime = self.issuing.lifetime;
        let chain = self
            .issuing
            .authority
            .issue(identity, csr.der(), lifetime, None)?;
        Ok((pem::certificates(&chain), key.serialize_pem()))
    }
}
