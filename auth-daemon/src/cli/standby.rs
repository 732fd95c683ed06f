//! Standby while another daemon serves the node: this daemon discovers pods and requests certificates, reports ready,
//! and takes over when the other daemon has released the node.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context;
use tokio::sync::{oneshot, watch};

use crate::{issuer::Certificates, proxy::Node};
use auth_datapath::{KernelError, PinLock};
use auth_mesh::{Identity, Registry};

/// Interval at which to check whether the node's pods hold their certificates themselves.
const POLL: Duration = Duration::from_millis(100);

/// Certificates of the node's pods, requested before they are needed.
#[derive(Debug, Default)]
pub(super) struct EarlyCertificates(BTreeSet<Identity>);

impl EarlyCertificates {
    fn follow(&mut self, registry: &Registry, certificates: &Certificates, node: &str) {
        let snapshot = registry.snapshot();
        let wanted: BTreeSet<_> = snapshot
            .on_node(node)
            .map(|pod| pod.identity.clone())
            .collect();
        for new in wanted.difference(&self.0) {
            certificates.acquire(new);
        }
        for gone in self.0.difference(&wanted) {
            certificates.release(gone);
        }
        self.0 = wanted;
    }

    /// Holds the certificates until the pods do.
    pub(super) async fn hand_over(self, node: Arc<Node>) {
        while !node.is_ready() && !self.0.is_empty() {
            tokio::time::sleep(POLL).await;
        }
        for identity in &self.0 {
            node.certificates.release(identity);
        }
    }
}

/// Waits until the lock on `pins` is free, and acquires it. Returns `None` if `stop` comes first. Until then, keeps
/// `early` in step with the pods of the node with that name.
pub(super) async fn stand_by(
    pins: &Path,
    (registry, certificates, node): (&Registry, &Certificates, &str),
    early: &mut EarlyCertificates,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<Option<PinLock>> {
    tracing::info!(
        node,
        "another daemon serves this node, standing by until it releases the node"
    );
    let mut changes = registry.changes();
    early.follow(registry, certificates, node);
    let mut lock = when_free(pins.to_owned()).context("cannot wait for the other daemon")?;
    loop {
        tokio::select! {
            taken = &mut lock => {
                let lock = taken.context("cannot wait for the other daemon")??;
                tracing::info!(node, certificates = early.0.len(), "previous daemon released the node, taking over");
                return Ok(Some(lock));
            }
            _ = stop.changed() => return Ok(None),
            Ok(()) = changes.changed() => early.follow(registry, certificates, node),
        }
    }
}

/// Returns a receiver that gets the lock once it is acquired. The thread that waits for the lock ends with the process
/// at the latest.
fn when_free(pins: PathBuf) -> std::io::Result<oneshot::Receiver<Result<PinLock, KernelError>>> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("stand-by".into())
        .spawn(move || {
            // If the receiver is gone, the lock is released with the value that is dropped here.
            let _ = sender.send(PinLock::wait(&pins));
        })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gets_the_lock_when_it_is_released() {
        let folder = tempfile::tempdir().unwrap();
        let pins = folder.path().join("pins");
        let held = PinLock::take(&pins).unwrap();
        let mut waits = when_free(pins.clone()).unwrap();
        assert!(waits.try_recv().is_err());
        drop(held);
        let _held = waits.await.unwrap().unwrap();
        assert!(matches!(PinLock::take(&pins), Err(KernelError::Locked(_))));
    }
}
