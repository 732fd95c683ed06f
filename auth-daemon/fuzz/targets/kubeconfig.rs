//! Kubeconfigs in remote secrets: never a panic, and no client for one that names a program or a file, or knows only servers
//! without TLS.

use serde_json::{Map, Value};
use tokio::runtime::Builder;

/// Fields of users that are refused.
const REFUSED: [&str; 3] = ["exec", "auth-provider", "tokenFile"];

pub(super) fn run(input: &[u8]) {
    let Ok(runtime) = Builder::new_current_thread().enable_all().build() else {
        return;
    };
    let client = runtime.block_on(auth_kubernetes::connect_by(input));
    let Ok(read) = serde_json::from_slice::<Value>(input) else {
        return;
    };
    let users = read["users"].as_array().into_iter().flatten();
    let fields = users.filter_map(|user| user["user"].as_object());
    let mut names = fields.flat_map(Map::keys);
    if names.any(|name| REFUSED.contains(&name.as_str())) {
        assert!(client.is_err());
    }
    let clusters = read["clusters"].as_array().into_iter().flatten();
    let mut servers = clusters.map(|cluster| cluster["cluster"]["server"].as_str());
    let is_plain =
        |server: Option<&str>| server.is_some_and(|server| server.starts_with("http://"));
    if servers.next().is_some_and(is_plain) && servers.all(is_plain) {
        assert!(client.is_err());
    }
}
