//! Keeps the bundles of foreign trust domains current: follows the configuration's `federation` list, reads bundle files, and
//! polls bundle endpoints (SPIFFE Federation §4.2, §5).

mod known;
mod sources;

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;

pub use known::{DomainStatus, Federated};

use crate::config::Config;

/// How often the configuration file and bundle files are read. A removal must end connections within two seconds.
const READ_INTERVAL: Duration = Duration::from_millis(500);
/// Largest configuration file that is read again, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Follows the `federation` list in the configuration `file`, forever. Nothing else of the file is applied. While the file
/// cannot be used, the list before stays in force.
pub async fn follow(federated: Arc<Federated>, file: PathBuf) {
    let mut before = None;
    loop {
        sleep(READ_INTERVAL).await;
        let now = read(&file, MAX_CONFIG);
        if now.as_ref().ok() == before.as_ref() {
            continue;
        }
        let parsed = now
            .as_ref()
            .map_err(ToString::to_string)
            .and_then(|content| {
                let text = str::from_utf8(content).map_err(|error| error.to_string())?;
                Config::parse(text).map_err(|errors| errors.join("; "))
            });
        match parsed {
            Ok(config) => federated.apply(&config.federation),
            Err(error) => tracing::error!(
                file = %file.display(), error,
                "configuration cannot be used; keeping the known federation list"
            ),
        }
        before = now.ok();
    }
}

/// Reads a file of at most `limit` bytes.
fn read(file: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(file)?
        .take(limit + 1)
        .read_to_end(&mut content)?;
    match content.len() as u64 > limit {
        true => Err(io::Error::other(format!("is longer than {limit} bytes"))),
        false => Ok(content),
    }
}
