//! Folders of the cgroup v2 tree: making them, ending all that runs in them, removing them.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::eventually::eventually_ok;

pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making the cgroup {}", path.display()))
}

/// Ends every process in the cgroup and below it, and waits until they are gone.
pub(crate) fn kill(path: &Path) -> Result<()> {
    // Linux 5.14. It also catches what is forked meanwhile.
    match fs::write(path.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result.with_context(|| format!("killing the cgroup {}", path.display()))?,
    }
    eventually_ok(
        Duration::from_secs(10),
        &format!("the end of what runs in {}", path.display()),
        || {
            let events = match fs::read_to_string(path.join("cgroup.events")) {
                // Somebody else has removed it meanwhile: another thread that cleans up.
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                events => events.context("reading cgroup.events")?,
            };
            events
                .contains("populated 0")
                .then_some(())
                .ok_or_else(|| anyhow!("still populated"))
        },
    )
}

/// Ends what runs in the cgroup and removes it with all below it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    kill(path)?;
    remove_folders(path)
}

fn remove_folders(path: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(path) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_folders(&entry.path())?;
        }
    }
    // The last process may have left the count before it has left the folder.
    eventually_ok(
        Duration::from_secs(10),
        "an empty cgroup",
        || match fs::remove_dir(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing the cgroup {}", path.display()))
            }
            _ => Ok(()),
        },
    )
}
