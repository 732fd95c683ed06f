//! Removes everything that the daemon intentionally leaves in the kernel.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io, thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use aya::programs::{ProgramError, loaded_programs};

use super::{
    PinLock,
    kernel::{attached_programs, layouts, pinned_pods, remove_layout},
    netns, plumbing,
};

/// How long the kernel may take to detach programs after their links' pins are removed. It does so in the background.
const DETACHED: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// Removes the programs, maps, pins, rules, routes and sysctls of the daemon whose pins `lock` guards, and waits until the
/// programs act on no connection any more. Returns the number of pods that were enrolled.
pub fn unload(lock: PinLock) -> anyhow::Result<usize> {
    let folder = lock.folder().to_owned();
    let layouts = layouts(&folder);
    let pods: HashMap<_, _> = layouts
        .iter()
        .flat_map(|layout| pinned_pods(layout))
        .collect();
    let programs = layouts.iter().flat_map(|layout| attached_programs(layout));
    let programs = programs.collect();
    for layout in layouts {
        remove_layout(&layout).with_context(|| format!("{}", layout.display()))?;
    }
    let namespaces = netns::all();
    for (cookie, entry) in &pods {
        // A deleted netns took its routes with it.
        if let Some(netns) = namespaces.iter().find(|netns| netns.cookie() == *cookie) {
            plumbing::tear_down(netns, entry.switched_on)
                .with_context(|| format!("{}: cannot undo routes", netns.path().display()))?;
        }
    }
    fs::remove_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    wait_until_gone(programs, loaded, DETACHED)?;
    Ok(pods.len())
}

/// Waits until none of `programs` is among those that `loaded` returns. Fails after `patience`.
fn wait_until_gone(
    mut programs: BTreeSet<u32>,
    loaded: impl Fn() -> Result<BTreeSet<u32>, ProgramError>,
    patience: Duration,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while !programs.is_empty() {
        let loaded = loaded().context("cannot tell whether the programs are unloaded")?;
        programs.retain(|program| loaded.contains(program));
        anyhow::ensure!(
            programs.is_empty() || start.elapsed() < patience,
            "the pins are removed, but programs are still loaded after {patience:?}, and may refuse connections: IDs \
             {programs:?}; end the process that holds them (bpftool prog show), or restart the node"
        );
        if !programs.is_empty() {
            thread::sleep(POLL);
        }
    }
    Ok(())
}

/// IDs of all programs in the kernel. A program has one until its last link is released.
fn loaded() -> Result<BTreeSet<u32>, ProgramError> {
    let programs = loaded_programs().filter(|program| match program {
        // It was unloaded while they were listed.
        Err(ProgramError::SyscallError(error)) => error.io_error.kind() != io::ErrorKind::NotFound,
        _ => true,
    });
    programs
        .map(|program| program.map(|program| program.id()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn waits_until_the_last_program_is_gone() {
        let polls = Cell::new(0);
        // Each poll finds one less, and those of others.
        let loaded = || {
            polls.set(polls.get() + 1);
            Ok(BTreeSet::from(
                [7, 8, 9, 100].map(|id| id + polls.get() - 1),
            ))
        };
        wait_until_gone([8, 9].into(), loaded, Duration::MAX).unwrap();
        assert_eq!(polls.get(), 4);
        wait_until_gone(BTreeSet::new(), loaded, Duration::ZERO).unwrap();
        assert_eq!(polls.get(), 4, "nothing to wait for");
    }

    #[test]
    fn names_what_is_still_loaded() {
        let loaded = || Ok([7, 8].into());
        let patience = Duration::from_millis(20);
        let failed = wait_until_gone([8, 9].into(), loaded, patience).unwrap_err();
        let why = failed.to_string();
        assert!(
            why.contains("still loaded after 20ms") && why.contains("{8}"),
            "{why}"
        );
    }
}
