//! Reconciles the Secrets of one namespace with its service accounts.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use auth_ca_api::pem;
use auth_kubernetes::{ApiError, Objects, follow};
use auth_mesh::{Identity, TrustDomain};
use futures_util::{StreamExt, future::ready};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, ResourceExt,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{reflector::ObjectRef, watcher},
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::CertificateDer;

use super::verdict::{
    CHAIN, DISTRIBUTED_LABEL, KEY, ROOTS, SECRET_TYPE, Verdict, is_ours, verdict,
};
use crate::{
    authority::{Authority, Holder, Refusal},
    control::{RETRY, reconcile_all, touched},
};

/// Precedes the service account in a Secret's name.
const PREFIX: &str = "istio.";
const ACCOUNT_ANNOTATION: &str = "istio.io/service-account.name";
/// How often a Secret is checked without an event. Another Secret with its name may have been removed.
const CHECK: Duration = Duration::from_secs(300);

/// Where the Secrets are, and who signs their certificates.
pub(super) struct Issuing<'a> {
    pub(super) client: &'a Client,
    pub(super) trust_domain: &'a TrustDomain,
    pub(super) lifetime: Duration,
    pub(super) authority: &'a Authority,
}

/// Keeps the Secrets of namespace `name` up to date, forever.
pub(super) async fn keep(issuing: &Issuing<'_>, name: &str) {
    let client = issuing.client;
    // Only the names of Secrets: their content is read when it is needed.
    let secrets = follow(
        Api::<PartialObjectMeta<Secret>>::namespaced(client.clone(), name),
        watcher::Config::default().labels(&format!("{DISTRIBUTED_LABEL}=true")),
        "Secrets with certificates",
    );
    let namespace = name.to_owned();
    let accounts = touched(secrets.map(Ok)).filter_map(move |secret| {
        let account = secret.name_any();
        let account = account.strip_prefix(PREFIX);
        ready(account.map(|account| ObjectRef::new(account).within(&namespace)))
    });
    let namespace = &Namespace {
        issuing,
        name,
        secrets: Objects::of(client.clone(), name),
        foreign: Mutex::default(),
    };
    reconcile_all(
        Api::<PartialObjectMeta<ServiceAccount>>::namespaced(client.clone(), name),
        "service accounts",
        accounts,
        issuing.authority.published(),
        |account| async move {
            let uid = account.uid().unwrap_or_default();
            namespace.reconcile(&account.name_any(), uid).await
        },
        |account| async move { namespace.remove(&account).await },
    )
    .await;
}

struct Namespace<'a> {
    issuing: &'a Issuing<'a>,
    name: &'a str,
    secrets: Objects<Secret>,
    /// Accounts whose Secret's name is taken, which is logged once.
    foreign: Mutex<BTreeSet<String>>,
}

/// The result of reconciling one account.
enum Done {
    /// Nothing is due until this time.
    Until(SystemTime),
    /// A Secret that this controller did not create has the name.
    Foreign,
}

impl Namespace<'_> {
    /// Removes the Secret of an account that does not exist. If that fails, the cluster's garbage collector does it,
    /// because the account owns the Secret.
    async fn remove(&self, account: &str) {
        let name = format!("{PREFIX}{account}");
        let secret = format!("{}/{name}", self.name);
        let removed = async {
            let found = self.secrets.get(&name).await?.filter(is_ours);
            let Some(found) = found else { return Ok(()) };
            self.secrets.delete(&name, found.metadata.uid).await?;
            tracing::info!(secret, "Secret removed with its service account");
            Ok::<_, ApiError>(())
        };
        if let Err(error) = removed.await {
            tracing::error!(secret, %error, "Secret of a former service account cannot be removed");
        }
    }

    /// Keeps the Secret of `account` up to date. Returns when to do so again.
    async fn reconcile(&self, account: &str, uid: String) -> Duration {
        let secret = format!("{}/{PREFIX}{account}", self.name);
        let done = self.update(account, uid).await;
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        let was_foreign = foreign.remove(account);
        match done {
            Ok(Done::Until(time)) => {
                let wait = time.duration_since(SystemTime::now()).unwrap_or_default();
                wait.min(CHECK)
            }
            Ok(Done::Foreign) => {
                foreign.insert(account.to_owned());
                if !was_foreign {
                    tracing::error!(
                        secret,
                        "Secret not created: another Secret has its name. Remove that one, or remove the namespace \
                         from secrets.namespaces"
                    );
                }
                CHECK
            }
            Err(error) => {
                tracing::error!(secret, %error, "Secret with a certificate cannot be kept");
                RETRY
            }
        }
    }

    async fn update(&self, account: &str, uid: String) -> Result<Done, String> {
        let secret_name = format!("{PREFIX}{account}");
        let full_name = format!("{}/{secret_name}", self.name);
        let text = |error: ApiError| error.to_string();
        let found = self.secrets.get(&secret_name).await.map_err(text)?;
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
            uid,
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
            _ => Err("it does not contain what was written: something else changes it".into()),
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
        let authority = self.issuing.authority;
        let issued = authority.issue(identity, csr.der(), lifetime, Holder::Node(""))?;
        Ok((pem::certificates(&issued.chain), key.serialize_pem()))
    }
}
