//! Machines that join by a token, and the certificates with which their daemons authenticate from then on.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use auth_ca_api::JOIN_TOKEN_PREFIX;
use auth_support::config::node_name;
use auth_tunnel::tls::{rfc3339, svid::NodeCertificate, unix_seconds};

use super::{Authority, Issued, Refusal, check_signing};
use crate::{
    audit,
    csr::RequestedKey,
    join::{self, DEFAULT_LIFETIME, GONE, JoinToken, LIFETIMES},
    signer::{self, BACKDATE, hex},
    status::JoinedNodeStatus,
    view::CaView,
};

impl Authority {
    /// Creates a token by which one machine can join as `node` within `lifetime`; zero is the default. With `replace`, the
    /// machine takes the place of one that has joined under that name. `created_by` is the operator's user ID.
    pub async fn create_join_token(
        self: &Arc<Self>,
        node: &str,
        lifetime: Duration,
        replace: bool,
        created_by: Option<u32>,
    ) -> Result<String, Refusal> {
        self.check_name(node)?;
        let lifetime = match lifetime {
            Duration::ZERO => DEFAULT_LIFETIME,
            lifetime if LIFETIMES.contains(&lifetime) => lifetime,
            lifetime => {
                return Err(Refusal::Request(format!(
                    "a token's lifetime is between {:?} and {:?}, not {lifetime:?}",
                    LIFETIMES.start(),
                    LIFETIMES.end()
                )));
            }
        };
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret)
            .map_err(|_| Refusal::State("no random numbers".into()))?;
        let secret = format!("{JOIN_TOKEN_PREFIX}{}", hex(&secret));
        let (hash, node) = (join::hash(secret.as_bytes()), node.to_owned());
        self.change(move |state, _, now| {
            state.revocations().check_node(&node)?;
            let token = JoinToken {
                node,
                expires: now + lifetime.as_secs(),
                created_by,
                replace,
            };
            state.joins.create(hash, token).map_err(Refusal::State)
        })
        .await?;
        Ok(secret)
    }

    /// Deletes the token for `node`, if it is not used yet.
    pub async fn delete_join_token(self: &Arc<Self>, node: &str) -> Result<(), Refusal> {
        let node = node.to_owned();
        self.change(move |state, _, _| match state.joins.delete(&node) {
            true => Ok(()),
            false => Err(Refusal::State(format!(
                "there is no token for node {node:.64?}: it was used, has expired, or never existed"
            ))),
        })
        .await
    }

    /// The node that joins with `token`, if that can be used.
    pub(crate) fn node_of_token(&self, token: &str) -> Result<String, Refusal> {
        let view = self.view.load();
        let hash = join::hash(token.as_bytes());
        let found = view.joins.node_of(&hash, self.clock.now());
        let node = found.ok_or_else(|| Refusal::Request(GONE.into()))?;
        self.check_name(node)?;
        Ok(node.to_owned())
    }

    /// Uses `token` for the machine that holds the key of `csr` (PKCS #10, DER). Returns its node's name and certificate.
    pub(crate) async fn join(
        self: &Arc<Self>,
        token: &str,
        csr: &[u8],
        lifetime: Duration,
    ) -> Result<(String, Issued), Refusal> {
        // Before the token is used up.
        let node = self.node_of_token(token)?;
        let key = self.node_key(&node, csr)?;
        let lifetime = self.lifetime(lifetime)?;
        let (hash, digest) = (join::hash(token.as_bytes()), join::hash(&key.spki()));
        let view = self.view.load_full();
        // A repeated answer needs no new state, nor new revocation lists.
        if !view.joins.is_used_by(&hash, &digest, self.clock.now()) {
            self.change(move |state, _, now| {
                let joined = state.joins.join(&hash, digest, now);
                joined.map_err(Refusal::Request)
            })
            .await?;
        }
        let issued = self.issue_to_node(&node, &key, lifetime)?;
        Ok((node, issued))
    }

    /// Renews `certificate` (DER), whose key must be that of `csr` (PKCS #10, DER). As [`Authority::node`], it does not
    /// verify the chain.
    pub(crate) fn renew_node(
        &self,
        certificate: &[u8],
        csr: &[u8],
        lifetime: Duration,
    ) -> Result<Issued, Refusal> {
        let shown = self.node(certificate).map_err(Refusal::Request)?;
        let NodeCertificate { node, .. } =
            shown.ok_or_else(|| Refusal::Request("it is no node's own certificate".into()))?;
        let key = self.node_key(&node, csr)?;
        self.issue_to_node(&node, &key, self.lifetime(lifetime)?)
    }

    /// The content of `certificate` (DER), or none if it is not a node's own, but a workload's. Fails if it is not that of a
    /// machine that has joined, or if it has expired or is revoked.
    ///
    /// The caller has verified that it leads to a published root, as a TLS handshake does. It does not matter which
    /// issuer signed it, because the key counts: replacing an intermediate does not lock out machines that joined
    /// before.
    pub(crate) fn node(&self, certificate: &[u8]) -> Result<Option<NodeCertificate>, String> {
        let Ok(shown) = NodeCertificate::parse(certificate, &self.settings.trust_domain) else {
            return Ok(None);
        };
        let view = self.view.load();
        if unix_seconds(shown.not_after) <= self.clock.now() {
            return Err("it has expired: the node needs a new join token".into());
        }
        let revoked = &view.published.revoked;
        revoked
            .check_node(&shown.node)
            .map_err(|revoked| revoked.to_string())?;
        if let Some(reason) = revoked.serials.get(&*shown.serial) {
            return Err(format!("{} is revoked ({reason})", shown.serial));
        }
        self.check_name(&shown.node)
            .map_err(|error| error.to_string())?;
        let parsed = signer::parse(certificate)?;
        match view
            .joins
            .has_key(&shown.node, &join::hash(parsed.public_key().raw))
        {
            Some(true) => Ok(Some(shown)),
            Some(false) => Err(format!("another machine has joined as node {}", shown.node)),
            None => Err(format!(
                "node {} has not joined, or was revoked since: it needs a new join token",
                shown.node
            )),
        }
    }

    /// Fails if a certificate of a workload on `node`, valid from `not_before` on, was issued before the node's present
    /// machine joined: a previous machine got the certificate, and may be in the wrong hands.
    pub(crate) fn check_since_join(
        &self,
        node: &str,
        not_before: SystemTime,
    ) -> Result<(), String> {
        let issued = unix_seconds(not_before).saturating_add(BACKDATE);
        match self.view.load().joins.joined_at(node) {
            Some(joined) if issued < joined => Err(format!(
                "it was issued before the present machine of node {node} joined"
            )),
            _ => Ok(()),
        }
    }

    /// Whether a machine has joined as `node`.
    pub(crate) fn has_joined(&self, node: &str) -> bool {
        self.check_name(node).is_ok() && self.view.load().joins.has_key(node, "").is_some()
    }

    /// Fails if no machine can join as `node`.
    fn check_name(&self, node: &str) -> Result<(), Refusal> {
        let Some(taken) = &self.settings.taken_nodes else {
            return Err(Refusal::State(
                "no machine can join: this CA asks the API server which pods run where, which knows only nodes of \
                 the cluster. Machines need a CA with discovery.files"
                    .into(),
            ));
        };
        // A SPIFFE ID has no segment of dots.
        if node_name(node).is_err() || node.starts_with('.') {
            return Err(Refusal::Request(format!("{node:.64?} is not a node name")));
        }
        if taken.contains(node) {
            return Err(Refusal::State(format!(
                "node {node} has a token in attestation.tokens"
            )));
        }
        Ok(())
    }

    /// The key of a CSR for the certificate of `node`.
    fn node_key(&self, node: &str, csr: &[u8]) -> Result<RequestedKey, Refusal> {
        let refused = |error: &dyn std::fmt::Display| Refusal::Request(error.to_string());
        let key = RequestedKey::from_csr(csr).map_err(|error| refused(&error))?;
        key.check_names(&NodeCertificate::uri(node, &self.settings.trust_domain))
            .map_err(|error| refused(&error))?;
        match self.view.load().owns_key(&key.spki()) {
            false => Ok(key),
            true => Err(refused(&"the CSR's key is the CA's own")),
        }
    }

    /// Signs `key`, if a machine with that key has joined as `node`.
    fn issue_to_node(
        &self,
        node: &str,
        key: &RequestedKey,
        lifetime: u64,
    ) -> Result<Issued, Refusal> {
        let view = self.view.load_full();
        let digest = join::hash(&key.spki());
        let check = |view: &CaView| {
            view.published.revoked.check_node(node)?;
            match view.joins.has_key(node, &digest) {
                Some(true) => Ok(()),
                _ => Err(Refusal::Request(format!(
                    "the key is not the one with which node {node} has joined"
                ))),
            }
        };
        check(&view)?;
        let (domain, now) = (&self.settings.trust_domain, self.clock.now());
        let leaf = view.signing.node(node, domain, key, lifetime, now)?;
        // The state may have changed meanwhile, as in `issue`.
        let current = self.view.load();
        check(&current)?;
        check_signing(&view, &current)?;
        self.node_certificates
            .issued(node, leaf.not_after, &current);
        Ok(Issued {
            chain: view.signing.chain(&leaf),
            roots: current.published.roots.clone(),
        })
    }

    /// Logs the tokens that have expired unused.
    pub(super) fn report_expired(expired: &[JoinToken]) {
        for token in expired {
            audit::join_token("joinTokenExpired", &token.node, token.created_by);
        }
    }
}

/// Until when the last certificates of joined machines are valid that this replica has issued since it leads, in seconds since
/// the Unix epoch, by node. In memory alone: a renewal writes nothing to the state.
#[derive(Debug, Default)]
pub(super) struct NodeCertificates(Mutex<HashMap<String, u64>>);

impl NodeCertificates {
    fn issued(&self, node: &str, until: u64, view: &CaView) {
        let mut known = self.lock();
        known.retain(|node, _| view.joins.joined_at(node).is_some());
        known.insert(node.to_owned(), until);
    }

    /// The status of the machines that have joined.
    pub(super) fn status(&self, view: &CaView) -> Vec<JoinedNodeStatus> {
        let known = self.lock();
        let nodes = view.joins.nodes().map(|(node, joined)| JoinedNodeStatus {
            certificate_until: known.get(node).copied().map(rfc3339),
            ..(node, joined).into()
        });
        nodes.collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
