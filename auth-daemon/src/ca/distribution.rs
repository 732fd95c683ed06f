//! Keys and certificates in Secrets, for programs that read them from files (Istio's `istio.<service account>`).
//!
//! For each service account of the selected namespaces there is a Secret; it is renewed, and removed with its account.
//! The key is made here and is as secret as the Secret: who can do without, lets the node's daemon make its keys. Only
//! the leader does this.

mod namespace;
mod verdict;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Client, api::ObjectMeta};
use tokio::{sync::watch, time::sleep};

use super::authority::Authority;
use crate::{
    kubernetes::{Fault, Objects},
    mesh::TrustDomain,
};

/// On Secrets that this program made, with value `true`: only these are ever changed or removed.
pub const DISTRIBUTED_LABEL: &str = "auth-daemon.io/ca-secret";
/// Istio's type.
pub const SECRET_TYPE: &str = "istio.io/key-and-cert";
/// What a Secret's name begins with; the service account's name follows.
pub const PREFIX: &str = "istio.";
const ACCOUNT_ANNOTATION: &str = "istio.io/service-account.name";
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "key.pem";
const ROOTS: &str = "root-cert.pem";
const NAMESPACES: &str = "namespaces";

/// First and longest pause after a failure.
const RETRY: Duration = Duration::from_secs(2);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// Which Secrets to keep.
#[derive(Clone)]
pub struct Distribution {
    /// The cluster.
    pub client: Client,
    /// Of the identities.
    pub trust_domain: TrustDomain,
    /// The namespaces whose service accounts get Secrets.
    pub namespaces: BTreeSet<String>,
    /// Life of the certificates.
    pub lifetime: Duration,
    /// The CA's own namespace.
    pub state_namespace: String,
    /// The CA's own Secret. Beside it, `<name>-distribution` says which namespaces may hold Secrets of ours.
    pub state_secret: String,
}

impl std::fmt::Debug for Distribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Distribution")
            .field("namespaces", &self.namespaces)
            .finish_non_exhaustive()
    }
}

impl Distribution {
    /// Keeps the Secrets whenever this process leads, for ever.
    pub async fn run(self, mut leader: watch::Receiver<Option<Arc<Authority>>>) {
        loop {
            let Ok(authority) = leader
                .wait_for(Option::is_some)
                .await
                .map(|now| now.clone())
            else {
                return;
            };
            let Some(authority) = authority else { continue };
            tokio::select! {
                biased;
                // Dropped in the middle of whatever it does: the next leader sees what is there.
                changed = leader.changed() => if changed.is_err() { return },
                () = self.serve(&authority) => {}
            }
        }
    }

    async fn serve(&self, authority: &Arc<Authority>) {
        let mut pause = RETRY;
        let selected_before = loop {
            match self.remember().await {
                Ok(before) => break before,
                Err(fault) => {
                    tracing::error!(%fault, "cannot note which namespaces get Secrets; none are made yet");
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_RETRY);
                }
            }
        };
        let mut all: FuturesUnordered<_> = self
            .namespaces
            .iter()
            .map(|name| namespace::keep(self, name, authority))
            .collect();
        let deselected = selected_before.difference(&self.namespaces);
        let clear = self.clear(deselected.cloned().collect());
        tokio::join!(clear, async { while all.next().await.is_some() {} });
    }

    /// Notes the selected namespaces before there is a Secret in them. Returns all that were ever noted.
    async fn remember(&self) -> Result<BTreeSet<String>, Fault> {
        let (secrets, name) = self.note();
        let found = secrets.get(&name).await?;
        let mut noted = found.as_ref().map(noted).unwrap_or_default();
        let before = noted.clone();
        noted.extend(self.namespaces.iter().cloned());
        if noted != before {
            self.write_note(found, &noted).await?;
        }
        Ok(noted)
    }

    async fn forget(&self, namespace: &str) -> Result<(), Fault> {
        let (secrets, name) = self.note();
        let Some(found) = secrets.get(&name).await? else {
            return Ok(());
        };
        let mut noted = noted(&found);
        noted.remove(namespace);
        self.write_note(Some(found), &noted).await
    }

    fn note(&self) -> (Objects<Secret>, String) {
        let secrets = Objects::of(self.client.clone(), &self.state_namespace);
        (secrets, format!("{}-distribution", self.state_secret))
    }

    async fn write_note(
        &self,
        found: Option<Secret>,
        namespaces: &BTreeSet<String>,
    ) -> Result<(), Fault> {
        let (secrets, name) = self.note();
        let lines: Vec<_> = namespaces.iter().map(String::as_str).collect();
        let content = ByteString(lines.join("\n").into_bytes());
        let is_new = found.is_none();
        let mut secret = found.unwrap_or_else(|| Secret {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(self.state_namespace.clone()),
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".into()),
            ..Secret::default()
        });
        secret.data = Some([(NAMESPACES.to_owned(), content)].into());
        if is_new {
            secrets.create(&secret).await?;
        } else {
            secrets.replace(&name, &secret).await?;
        }
        Ok(())
    }

    /// Removes our Secrets from namespaces that are not selected any more.
    async fn clear(&self, mut deselected: BTreeSet<String>) {
        let mut pause = RETRY;
        while let Some(namespace) = deselected.pop_first() {
            match self.clear_one(&namespace).await {
                Ok(count) => tracing::info!(
                    namespace,
                    count,
                    "namespace is not selected any more: its Secrets with certificates are removed"
                ),
                Err(fault) => {
                    tracing::error!(
                        namespace, %fault,
                        "cannot remove the Secrets of a namespace that is not selected any more: let the CA list \
                         and delete Secrets there until they are gone"
                    );
                    deselected.insert(namespace);
                    sleep(pause).await;
                    pause = (pause * 2).min(MAX_RETRY);
                }
            }
        }
    }

    async fn clear_one(&self, namespace: &str) -> Result<usize, Fault> {
        let secrets: Objects<Secret> = Objects::of(self.client.clone(), namespace);
        let found = secrets.list(&format!("{DISTRIBUTED_LABEL}=true")).await?;
        let mut count = 0;
        for secret in found.into_iter().filter(verdict::is_ours) {
            let metadata = secret.metadata;
            secrets
                .delete(&metadata.name.unwrap_or_default(), metadata.uid)
                .await?;
            count += 1;
        }
        self.forget(namespace).await?;
        Ok(count)
    }
}

fn noted(secret: &Secret) -> BTreeSet<String> {
    let data = secret.data.as_ref();
    let lines = data.and_then(|data| data.get(NAMESPACES));
    let lines = lines.map(|lines| String::from_utf8_lossy(&lines.0).into_owned());
    let lines = lines.unwrap_or_default();
    let names = lines.lines().filter(|line| !line.is_empty());
    names.map(str::to_owned).collect()
}
