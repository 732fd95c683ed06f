//! The status of the CA: one structure, rendered as JSON by serde and for people by [`fmt::Display`].

use std::fmt;

use auth_tunnel::tls::{
    rfc3339,
    trust::{Reason, Revocations},
};
use serde::{Deserialize, Serialize};

use crate::{
    join::{JoinToken, JoinedNode},
    signer::{self, hex},
};

/// Joined nodes that the text lists; the JSON has all.
const SHOWN_NODES: usize = 50;

/// The status of one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaStatus {
    /// Whether this replica signs.
    pub leader: bool,
    /// The status of the authority; on the leader only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub authority: Option<AuthorityStatus>,
    /// What this replica's server has done since it started.
    pub server: ServerStatus,
}

/// The status of the authority.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthorityStatus {
    /// Its trust domain.
    pub trust_domain: String,
    /// `steady`, `spreading` or `retiring`.
    pub phase: String,
    /// When the next step of a rotation is due (RFC 3339).
    pub phase_ends: Option<String>,
    /// Version of what is published.
    pub version: u64,
    /// The signing key's algorithm.
    pub algorithm: String,
    /// Whether it signs as an intermediate (`pluggedIn` in its configuration).
    #[serde(rename = "pluggedIn")]
    pub intermediate: bool,
    /// All trusted roots.
    pub roots: Vec<RootStatus>,
    /// What is revoked.
    pub revoked: RevokedStatus,
    /// Join tokens that are not used yet: at most 100.
    #[serde(default)]
    pub join_tokens: Vec<JoinTokenStatus>,
    /// Machines that have joined: at most 1000.
    #[serde(default)]
    pub joined_nodes: Vec<JoinedNodeStatus>,
}

/// A join token that is not used yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinTokenStatus {
    /// The name of the node that joins with it.
    pub node: String,
    /// RFC 3339.
    pub expires: String,
    /// User ID of the operator who created it.
    pub created_by: Option<u32>,
    /// Whether the machine replaces one that has joined under that name.
    pub replace: bool,
}

impl From<&JoinToken> for JoinTokenStatus {
    fn from(token: &JoinToken) -> Self {
        Self {
            node: token.node.clone(),
            expires: rfc3339(token.expires),
            created_by: token.created_by,
            replace: token.replace,
        }
    }
}

impl fmt::Display for JoinTokenStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  until {}", self.node, self.expires)?;
        if let Some(uid) = self.created_by {
            write!(f, "  by user {uid}")?;
        }
        f.write_str(if self.replace { "  replaces" } else { "" })
    }
}

/// A machine that has joined.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinedNodeStatus {
    /// Its node's name.
    pub node: String,
    /// RFC 3339.
    pub at: String,
    /// User ID of the operator who created its token.
    pub created_by: Option<u32>,
    /// Until when its certificate is valid (RFC 3339), if this replica has issued or renewed it since it leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_until: Option<String>,
}

impl From<(&str, &JoinedNode)> for JoinedNodeStatus {
    fn from((node, joined): (&str, &JoinedNode)) -> Self {
        Self {
            node: node.to_owned(),
            at: rfc3339(joined.at),
            created_by: joined.created_by,
            certificate_until: None,
        }
    }
}

/// One root certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RootStatus {
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Fingerprint of the certificate.
    pub sha256: String,
    /// Its name.
    pub subject: String,
    /// Begin of its validity (RFC 3339).
    pub not_before: String,
    /// End of its validity (RFC 3339).
    pub not_after: String,
    /// Whether new certificates are issued under it.
    pub signs: bool,
}

impl RootStatus {
    /// The status of the root `der`; `None` if that is no certificate.
    pub(crate) fn new(der: &[u8], signs: bool) -> Option<Self> {
        let parsed = signer::parse(der).ok()?;
        let life = signer::life(&parsed);
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        Some(Self {
            serial: hex(parsed.raw_serial()),
            sha256: hex(digest.as_ref()),
            subject: parsed.subject().to_string(),
            not_before: rfc3339(life.begin),
            not_after: rfc3339(life.end),
            signs,
        })
    }
}

/// Everything that is revoked, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedStatus {
    /// Certificates, by serial number.
    pub serials: Vec<RevokedEntry>,
    /// Identities.
    pub identities: Vec<RevokedEntry>,
    /// Nodes.
    pub nodes: Vec<RevokedEntry>,
}

impl From<&Revocations> for RevokedStatus {
    fn from(revoked: &Revocations) -> Self {
        fn list<'a>(revoked: impl Iterator<Item = (&'a str, &'a Reason)>) -> Vec<RevokedEntry> {
            let mut entries: Vec<_> = revoked
                .map(|(name, reason)| RevokedEntry {
                    name: name.to_owned(),
                    reason: reason.to_string(),
                })
                .collect();
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            entries
        }
        Self {
            serials: list(revoked.serials.iter().map(|(serial, r)| (&**serial, r))),
            identities: list(revoked.identities.iter().map(|(id, r)| (id.as_str(), r))),
            nodes: list(revoked.nodes.iter().map(|(node, r)| (node.as_str(), r))),
        }
    }
}

/// One revocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedEntry {
    /// Serial number, SPIFFE ID or node name.
    pub name: String,
    /// A name of RFC 5280 §5.3.1.
    pub reason: String,
}

/// What a server has done since it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerStatus {
    /// Certificates issued.
    pub issued: u64,
    /// Requests refused, by kind.
    pub refused: serde_json::Map<String, serde_json::Value>,
    /// TLS handshakes that failed.
    pub failed_handshakes: u64,
    /// Connections refused before TLS, because a connection limit was reached.
    pub refused_connections: u64,
    /// Requests refused because a quota of their node was used up, by quota.
    #[serde(default)]
    pub over_quota: serde_json::Map<String, serde_json::Value>,
    /// Nodes that were refused most, then those with most identities: ten at most.
    #[serde(default)]
    pub nodes: Vec<NodeQuotaStatus>,
}

/// What one node has used of its quotas in the last hour.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeQuotaStatus {
    /// The node's name.
    pub node: String,
    /// Its requests in progress.
    pub in_progress: usize,
    /// Distinct identities that it got certificates for.
    pub identities: usize,
    /// Requests refused because a quota was used up.
    pub refused: u64,
}

impl fmt::Display for CaStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.authority {
            Some(authority) if self.leader => authority.fmt(f)?,
            _ => writeln!(f, "standby: another replica is the leader, ask that one")?,
        }
        let server = &self.server;
        writeln!(
            f,
            "\nSINCE THIS REPLICA STARTED\n  issued {}",
            server.issued
        )?;
        for (kind, count) in &server.refused {
            writeln!(f, "  refused as {kind} {count}")?;
        }
        writeln!(f, "  failed handshakes {}", server.failed_handshakes)?;
        writeln!(f, "  refused connections {}", server.refused_connections)?;
        for (quota, count) in &server.over_quota {
            writeln!(f, "  over quota {quota} {count}")?;
        }
        writeln!(f, "\nNODES IN THE LAST HOUR ({})", server.nodes.len())?;
        for node in &server.nodes {
            let NodeQuotaStatus {
                node,
                in_progress,
                identities,
                refused,
            } = node;
            writeln!(
                f,
                "  {node}  identities {identities}  in progress {in_progress}  refused {refused}"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for AuthorityStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "trust domain {}  phase {}  algorithm {}",
            self.trust_domain, self.phase, self.algorithm
        )?;
        writeln!(f, "\nROOTS ({})", self.roots.len())?;
        for root in &self.roots {
            let signs = if root.signs { "  signs" } else { "" };
            let RootStatus {
                serial,
                sha256,
                not_after,
                ..
            } = root;
            writeln!(f, "  {serial}  until {not_after}  sha256 {sha256}{signs}")?;
        }
        let revoked = &self.revoked;
        for (title, entries) in [
            ("SERIALS", &revoked.serials),
            ("IDENTITIES", &revoked.identities),
            ("NODES", &revoked.nodes),
        ] {
            writeln!(f, "\nREVOKED {title} ({})", entries.len())?;
            for entry in entries {
                writeln!(f, "  {}  {}", entry.name, entry.reason)?;
            }
        }
        writeln!(f, "\nUNUSED JOIN TOKENS ({})", self.join_tokens.len())?;
        for token in &self.join_tokens {
            writeln!(f, "  {token}")?;
        }
        writeln!(f, "\nJOINED NODES ({})", self.joined_nodes.len())?;
        for node in self.joined_nodes.iter().take(SHOWN_NODES) {
            let until = node.certificate_until.as_deref();
            let until = until.unwrap_or("not known: it was not renewed since this replica leads");
            writeln!(
                f,
                "  {}  since {}  certificate until {until}",
                node.node, node.at
            )?;
        }
        let more = self.joined_nodes.len().saturating_sub(SHOWN_NODES);
        if more > 0 {
            writeln!(f, "  and {more} more (--json lists all)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn renders_one_structure_as_json_and_as_text() {
        let status: CaStatus = serde_json::from_value(json!({
            "leader": true, "trustDomain": "cluster.local", "phase": "spreading", "phaseEnds": null, "version": 3,
            "algorithm": "P-256", "pluggedIn": false,
            "roots": [{"serial": "01", "notAfter": "2036", "sha256": "ab", "signs": true}, {"serial": "02"}],
            "revoked": {"serials": [], "identities": [], "nodes": [{"name": "a", "reason": "keyCompromise"}]},
            "server": {
                "issued": 5, "refused": {"denied": 2}, "failedHandshakes": 1, "refusedConnections": 0,
                "overQuota": {"nodeRate": 7}, "nodes": [{"node": "b", "inProgress": 1, "identities": 3, "refused": 7}],
            },
        }))
        .unwrap();
        let text = status.to_string();
        for expected in [
            "trust domain cluster.local  phase spreading  algorithm P-256",
            "ROOTS (2)\n  01  until 2036  sha256 ab  signs\n  02",
            "REVOKED NODES (1)\n  a  keyCompromise\n",
            "refused as denied 2\n",
            "over quota nodeRate 7\n",
            "  b  identities 3  in progress 1  refused 7\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["revoked"]["nodes"][0]["name"], "a");
        let standby = serde_json::to_string(&CaStatus::default()).unwrap();
        let standby: CaStatus = serde_json::from_str(&standby).unwrap();
        assert!(standby.to_string().starts_with("standby: "));
    }
}
