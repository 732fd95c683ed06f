//! What becomes of open connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use serde::Deserialize;

use super::{Change, Differences, PLAINTEXT, Pod, Side, judge};
use crate::{Identity, policy::Connection};

/// An open connection, as `auth-daemon status --json` prints it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observed {
    /// The client's address.
    pub client: SocketAddr,
    /// The address that the client dialled.
    pub destination: Option<SocketAddr>,
    /// The server's own address and port.
    pub endpoint: Option<SocketAddr>,
    /// The client's SPIFFE ID.
    pub client_identity: Option<String>,
    /// How the connection reaches the server: `tunnel`, `same-node`, `plaintext` or `self`.
    pub path: String,
}

/// Adds what becomes of the `observed` connections to `differences`.
pub(super) fn judge_observed(
    old: &Side,
    new: &Side,
    observed: &[Observed],
    differences: &mut Differences,
) {
    let (old_pods, new_pods) = (old.by_address(), new.by_address());
    // A connection within a node is listed for both pods.
    let mut seen = BTreeSet::new();
    let mut changes: BTreeMap<(String, String, u16, String, String), usize> = BTreeMap::new();
    for connection in observed {
        let Some(endpoint) = connection.endpoint else {
            continue;
        };
        if connection.path == "self" || !seen.insert((connection.client, endpoint)) {
            continue;
        }
        let address = endpoint.ip().to_canonical();
        let source = connection.client.ip().to_canonical();
        let leaving = [source, address].into_iter().find_map(|address| {
            let (before, after) = (old_pods.get(&address)?, new_pods.get(&address)?);
            let leaves = old.is_member(before) && !new.is_member(after);
            leaves.then(|| after.full_name())
        });
        let (before, after) = (old_pods.get(&address), new_pods.get(&address));
        let server = match (&leaving, before.zip(after)) {
            (_, Some((_, after))) => after.full_name(),
            (Some(_), None) => endpoint.to_string(),
            (None, None) => {
                let unknown = format!("{} to {endpoint}", connection.client);
                differences.unknown.push(unknown);
                continue;
            }
        };
        let identity = connection.client_identity.as_ref();
        let identity: Option<Identity> = match connection.path.as_str() {
            "plaintext" => None,
            _ => identity.and_then(|identity| identity.parse().ok()),
        };
        let verdict = |side: &Side, pod: Option<&&Pod>| {
            let connection = Connection {
                client: identity.as_ref(),
                source,
                destination: SocketAddr::new(address, endpoint.port()),
            };
            judge(pod.and_then(|pod| side.view(pod)).as_deref(), &connection)
        };
        let (_, text_before) = verdict(old, before);
        let text_after = match (leaving, verdict(new, after)) {
            (Some(pod), _) => format!("{pod} leaves the mesh"),
            (None, (true, _)) => continue,
            (None, (false, why)) => why,
        };
        let client = match (&identity, new_pods.get(&source)) {
            (None, _) => format!("{PLAINTEXT} from {source}"),
            (Some(identity), Some(pod)) if pod.identity == identity.as_str() => pod.full_name(),
            (Some(identity), _) => format!("{identity} at {source}"),
        };
        let key = (client, server, endpoint.port(), text_before, text_after);
        *changes.entry(key).or_default() += 1;
    }
    differences.observed = Some(seen.len());
    let changes = changes.into_iter();
    let changes = changes.map(|((client, server, port, before, after), count)| Change {
        client,
        server,
        ports: port.to_string(),
        count,
        before,
        after,
    });
    differences.ending.extend(changes);
}
