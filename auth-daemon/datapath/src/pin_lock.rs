//! Lock on the pins, which belong to one daemon at a time. Also determines the next holder.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::KernelError;

/// Folder below the pins that is locked by the daemon that waits for them.
const SUCCESSOR: &str = "successor";

/// Exclusive lock on the pins in a folder. The kernel releases it when the process exits.
#[derive(Debug)]
pub struct PinLock {
    _lock: Flock<File>,
    folder: PathBuf,
}

impl PinLock {
    /// Takes the lock on `pins`. Creates the folder if it does not exist.
    pub fn take(pins: &Path) -> Result<Self, KernelError> {
        let pin = |error| KernelError::Pin {
            path: pins.to_owned(),
            error,
        };
        fs::create_dir_all(pins).map_err(pin)?;
        let file = File::open(pins).map_err(pin)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self {
                _lock: lock,
                folder: pins.to_owned(),
            }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(KernelError::Locked(pins.to_owned())),
            Err((_, error)) => Err(pin(error.into())),
        }
    }

    /// Waits until the holder of the lock on `pins` releases it or exits, and takes it. Blocks the thread. If several
    /// processes wait, one of them is the successor.
    pub fn wait(pins: &Path) -> Result<Self, KernelError> {
        let pin = |error| KernelError::Pin {
            path: pins.to_owned(),
            error,
        };
        let lock = |folder: &Path| {
            fs::create_dir_all(folder).map_err(pin)?;
            let file = File::open(folder).map_err(pin)?;
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| pin(error.into()))
        };
        loop {
            let _successor = lock(&pins.join(SUCCESSOR))?;
            let lock = lock(pins)?;
            let inode = lock.metadata().map_err(pin)?.ino();
            // The previous holder may have removed the folder. The lock must then be taken on the new one.
            if fs::metadata(pins).is_ok_and(|folder| folder.ino() == inode) {
                return Ok(Self {
                    _lock: lock,
                    folder: pins.to_owned(),
                });
            }
        }
    }

    /// Whether another daemon waits for the lock.
    pub(super) fn is_awaited(&self) -> bool {
        let Ok(file) = File::open(self.folder.join(SUCCESSOR)) else {
            return false;
        };
        let taken = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        matches!(taken, Err((_, nix::errno::Errno::EWOULDBLOCK)))
    }

    /// Path of the locked folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::*;

    #[test]
    fn who_has_the_pins_knows_that_another_one_waits() {
        let folder = tempfile::tempdir().unwrap();
        let pins = folder.path().join("pins");
        let held = PinLock::take(&pins).unwrap();
        assert!(!held.is_awaited(), "nobody ever has");
        assert!(matches!(PinLock::take(&pins), Err(KernelError::Locked(_))));
        let next = {
            let pins = pins.clone();
            thread::spawn(move || PinLock::wait(&pins).unwrap())
        };
        let start = Instant::now();
        while !held.is_awaited() {
            assert!(start.elapsed().as_secs() < 60, "it waits");
            thread::yield_now();
        }
        drop(held);
        let held = next.join().unwrap();
        assert!(!held.is_awaited(), "nobody any more");
        assert!(matches!(PinLock::take(&pins), Err(KernelError::Locked(_))));
    }

    #[test]
    fn a_folder_that_was_removed_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let pins = folder.path().join("pins");
        let held = PinLock::take(&pins).unwrap();
        let next = {
            let pins = pins.clone();
            thread::spawn(move || PinLock::wait(&pins).unwrap())
        };
        while !held.is_awaited() {
            thread::yield_now();
        }
        // As `unload` does.
        fs::remove_dir_all(&pins).unwrap();
        drop(held);
        let _held = next.join().unwrap();
        assert!(matches!(PinLock::take(&pins), Err(KernelError::Locked(_))));
    }
}
