//! A controller for apps that read a key and a certificate from a Secret (Istio's `istio.<service account>`).
//!
//! Each service account of the selected namespaces gets a Secret, which is renewed, and removed with its account. The CA
//! makes the key, which is as secret as the Secret is: docs/SECRETS.md says what that costs. Only the leader does this.

mod namespace;
mod verdict;

use std::{collections::BTreeSet, time::Duration};

use auth_kubernetes::{ApiError, Objects};
use auth_mesh::TrustDomain;
use futures_util::{StreamExt, stream::FuturesUnordered};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{Client, api::ObjectMeta};
use tokio::time::sleep;

use crate::{
    authority::{Authority, Leader, while_leading},
    control::RETRY,
};
use namespace::Issuing;
use verdict::DISTRIBUTED_LABEL;

const NAMESPACES: &str = "namespaces";

/// Which Secrets to keep.
#[derive(Clone)]
pub struct Distribution {
    /// The cluster.
    pub client: Client,
    /// The trust domain of the identities.
    pub trust_domain: TrustDomain,
    /// The namespaces whose service accounts get Secrets.
    pub namespaces: BTreeSet<String>,
    /// Lifetime of the certificates.
    pub lifetime: Duration,
    /// The CA's own namespace.
    pub state_namespace: String,
    /// The CA's own Secret. `<name>-distribution` beside it records which namespaces may contain distributed Secrets.
    pub state_secret: String,
}

impl Distribution {
    /// Keeps the Secrets up to date while this replica is the leader. Runs forever.
    pub async fn run(self, leader: Leader) {
        let run = &self;
        while_leading(
            leader,
            |authority| async move { run.serve(&authority).await },
        )
        .await;
    }

    async fn serve(&self, authority: &Authority) {
        let recorded = self.record().await;
        let issuing = Issuing {
            client: &self.client,
            trust_domain: &self.trust_domain,
            lifetime: self.lifetime,
            authority,
        };
        let mut all: FuturesUnordered<_> = self
            .namespaces
            .iter()
            .map(|name| namespace::keep(&issuing, name))
            .collect();
        let deselected = recorded.difference(&self.namespaces).cloned().collect();
        let clear = self.clear_all(deselected);
        tokio::join!(clear, async { while all.next().await.is_some() {} });
    }

    /// Records the selected namespaces before there is a Secret in them, so that they are cleaned up when they are
    /// deselected. Returns all that were ever recorded.
    async fn record(&self) -> BTreeSet<String> {
        loop {
            let record = |names: &mut BTreeSet<String>| names.extend(self.namespaces.clone());
            match self.update_record(record).await {
                Ok(recorded) => return recorded,
                Err(error) => tracing::error!(%error, "selected namespaces cannot be recorded"),
            }
            sleep(RETRY).await;
        }
    }

    async fn clear_all(&self, mut deselected: BTreeSet<String>) {
        while let Some(namespace) = deselected.pop_first() {
            if let Err(error) = self.clear(&namespace).await {
                tracing::error!(
                    namespace, %error,
                    "Secrets of a deselected namespace cannot be removed: allow the CA to list and delete them"
                );
                deselected.insert(namespace);
                sleep(RETRY).await;
            }
        }
    }

    /// Changes the recorded namespaces, and returns them.
    async fn update_record(
        &self,
        change: impl Fn(&mut BTreeSet<String>),
    ) -> Result<BTreeSet<String>, ApiError> {
        let secrets: Objects<Secret> = Objects::of(self.client.clone(), &self.state_namespace);
        let name = format!("{}-distribution", self.state_secret);
        let found = secrets.get(&name).await?;
        let before = found.as_ref().map(recorded).unwrap_or_default();
        let mut names = before.clone();
        change(&mut names);
        if names == before {
            return Ok(names);
        }
        let lines: Vec<_> = names.iter().map(String::as_str).collect();
        let content = ByteString(lines.join("\n").into_bytes());
        let data = Some([(NAMESPACES.to_owned(), content)].into());
        match found {
            Some(found) => {
                let secret = Secret { data, ..found };
                secrets.replace(&name, &secret).await?;
            }
            None => {
                let secret = Secret {
                    metadata: ObjectMeta {
                        name: Some(name),
                        namespace: Some(self.state_namespace.clone()),
                        ..ObjectMeta::default()
                    },
                    type_: Some("Opaque".into()),
                    data,
                    ..Secret::default()
                };
                secrets.create(&secret).await?;
            }
        }
        Ok(names)
    }

    /// Removes the distributed Secrets of a namespace that is not selected any more.
    async fn clear(&self, namespace: &str) -> Result<(), ApiError> {
        let secrets: Objects<Secret> = Objects::of(self.client.clone(), namespace);
        let found = secrets.list(&format!("{DISTRIBUTED_LABEL}=true")).await?;
        let mut count = 0;
        for secret in found.into_iter().filter(verdict::is_ours) {
            let metadata = secret.metadata;
            let name = metadata.name.unwrap_or_default();
            secrets.delete(&name, metadata.uid).await?;
            count += 1;
        }
        let forget = |names: &mut BTreeSet<String>| {
            names.remove(namespace);
        };
        self.update_record(forget).await?;
        tracing::info!(
            namespace,
            count,
            "Secrets of a deselected namespace removed"
        );
        Ok(())
    }
}

fn recorded(secret: &Secret) -> BTreeSet<String> {
    let data = secret.data.as_ref();
    let lines = data.and_then(|data| data.get(NAMESPACES));
    let lines = lines.map(|lines| String::from_utf8_lossy(&lines.0).into_owned());
    let lines = lines.unwrap_or_default();
    let names = lines.lines().filter(|line| !line.is_empty());
    names.map(str::to_owned).collect()
}
