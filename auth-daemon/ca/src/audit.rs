//! The audit log: one line for each issuance, refusal, revocation and rotation, with the tracing target `audit`. With
//! `log.format: json` each line is one JSON object. No line contains a key, a CSR or a token.

use std::net::SocketAddr;

use auth_jwt::Audience;
use auth_mesh::ObjectName;
use auth_tunnel::tls::{
    rfc3339,
    svid::{NodeCertificate, Svid},
    unix_seconds,
};

use crate::{attest::Caller, authority::Target, placement::Grant};

/// Longest text from a caller in a line, in characters.
const MAX_TEXT: usize = 256;

/// A certificate was issued.
pub(crate) fn issued(peer: SocketAddr, caller: &Caller, grant: &Grant, leaf: Option<&Svid>) {
    tracing::info!(
        target: "audit",
        event = "issued",
        %peer,
        %caller,
        node = grant.node,
        pods = names(grant),
        identity = %grant.identity,
        person = leaf.and_then(|leaf| leaf.person.as_deref()),
        serial = leaf.map_or("", |leaf| &*leaf.serial),
        not_after = leaf.map_or_else(String::new, |leaf| rfc3339(unix_seconds(leaf.not_after))),
        "certificate issued"
    );
}

/// A JWT-SVID was issued for `audience`. It expires at `expires`, in seconds since the Unix epoch.
pub(crate) fn issued_jwt(
    peer: SocketAddr,
    caller: &Caller,
    grant: &Grant,
    audience: &Audience,
    expires: u64,
) {
    tracing::info!(
        target: "audit",
        event = "jwtIssued",
        %peer,
        %caller,
        node = grant.node,
        pods = names(grant),
        identity = %grant.identity,
        audience = ?audience.to_vec(),
        not_after = rfc3339(expires),
        "JWT-SVID issued"
    );
}

fn names(grant: &Grant) -> String {
    let pods: Vec<_> = grant.pods.iter().map(ObjectName::to_string).collect();
    pods.join(",")
}

/// A machine has joined as `node` (event `nodeJoined`), or its certificate `serial` was renewed (`nodeRenewed`).
pub(crate) fn node(event: &'static str, peer: SocketAddr, node: &str, leaf: &NodeCertificate) {
    tracing::info!(
        target: "audit",
        event,
        %peer,
        node,
        serial = &*leaf.serial,
        not_after = rfc3339(unix_seconds(leaf.not_after)),
        "certificate issued to node"
    );
}

/// A join token was created, deleted, or has expired unused: `event` is `joinTokenCreated`, `joinTokenDeleted` or
/// `joinTokenExpired`. `uid` is the operator's; for a token that has expired, that of its creator.
pub(crate) fn join_token(event: &'static str, node: &str, uid: Option<u32>) {
    tracing::warn!(target: "audit", event, node, uid, "join token changed");
}

/// A request or a TLS handshake was refused. `asked` is what it asked for.
pub(crate) fn refused(
    peer: SocketAddr,
    caller: Option<&Caller>,
    asked: Option<&str>,
    kind: &'static str,
    why: &str,
) {
    let short = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
    tracing::warn!(
        target: "audit",
        event = "refused",
        %peer,
        caller = caller.map(ToString::to_string).unwrap_or_default(),
        node = caller.and_then(Caller::node).unwrap_or_default(),
        asked = asked.map(short).unwrap_or_default(),
        kind,
        why,
        "request refused"
    );
}

/// The operator with this user ID changed what is revoked, or began to rotate the root. `event` is `revoked`, `unrevoked`
/// or `rootRotation`.
pub(crate) fn operator(
    event: &'static str,
    target: Option<&Target>,
    detail: &str,
    uid: Option<u32>,
) {
    tracing::warn!(
        target: "audit",
        event,
        target_name = target.map(ToString::to_string).unwrap_or_default(),
        detail,
        uid,
        "operator request done"
    );
}
