//! Requests to the daemon of this node, on its admin port.

use std::time::Duration;

use anyhow::{Context, anyhow};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, runtime, time::timeout};

use crate::admin::ADMIN_PORT;
use auth_support::http_client;

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 256 << 20;

/// Requests `path`, with `body` as JSON if there is one, and reads the answer as JSON.
pub(super) fn request<T: DeserializeOwned>(
    path: &str,
    body: Option<&impl Serialize>,
    deadline: Duration,
) -> anyhow::Result<T> {
    let url = format!("http://127.0.0.1:{ADMIN_PORT}{path}");
    let body = body.map(serde_json::to_vec).transpose()?;
    let uri = url.parse()?;
    let request = async {
        let stream = TcpStream::connect(("127.0.0.1", ADMIN_PORT)).await?;
        let answer = match body {
            None => http_client::get(stream, &uri, MAX_ANSWER).await,
            Some(body) => http_client::post(stream, &uri, body, MAX_ANSWER).await,
        };
        let (status, body) = answer.map_err(|error| anyhow!(error))?;
        anyhow::ensure!(status == 200, "it answers HTTP {status}");
        Ok(serde_json::from_slice(&body)?)
    };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let answer = runtime.block_on(async { timeout(deadline, request).await });
    answer.unwrap_or_else(|_| Err(anyhow!("no answer within {deadline:?}")))
}
