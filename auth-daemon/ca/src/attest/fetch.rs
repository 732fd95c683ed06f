//! One HTTP GET, within limits.

use std::{path::Path, time::Duration};

use auth_support::https_client::{get, web_pki};
use auth_tunnel::tls::explain;

const DEADLINE: Duration = Duration::from_secs(5);

/// The body of `url`, of at most `limit` bytes. `https` servers are verified with the roots in `root_file`, or with the
/// system's.
pub(super) async fn fetch(
    url: &str,
    root_file: Option<&Path>,
    limit: usize,
) -> Result<Vec<u8>, String> {
    let uri = url.parse().map_err(|_| "not a URL".to_owned())?;
    get(&uri, || web_pki(root_file), explain, limit, DEADLINE).await
}
