//! The gate that keeps pods' netns closed until there is a verdict on them: see `auth-ebpf/src/gate.rs`.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use auth_common::PodRoot;
use aya::{
    Ebpf,
    maps::{HashMap, MapData, MapError},
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType},
};
use tokio::sync::Notify;

use super::{
    KernelError,
    kernel::{link_error, lock, map_error, program, program_error, replace_pin, take_map},
};

/// Name of the program.
pub(super) const PROGRAM: &str = "gate";
/// Name of the map of netns outside the mesh.
pub(super) const MAP: &str = "OUTSIDE";

/// The pods' netns that are known to be outside the mesh, and the cgroups whose sockets the gate's program sees.
#[derive(Debug)]
pub struct Gate {
    outside: Mutex<HashMap<MapData, u64, u32>>,
    /// The ids of the cgroups that this daemon has attached the program to.
    attached: Mutex<HashSet<u64>>,
    /// Notified of sockets that pods create in closed netns.
    pub(super) knocks: Arc<Notify>,
}

impl Gate {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let outside = HashMap::try_from(take_map(ebpf, MAP)?).map_err(map_error(MAP))?;
        Ok(Self {
            outside: Mutex::new(outside),
            attached: Mutex::default(),
            knocks: Arc::default(),
        })
    }

    /// Attaches the program to the cgroups that contain all pods, `roots`, and replaces what a previous daemon has attached
    /// there. Cgroups that are attached to already are left alone. `links` is the folder of the links' pins.
    pub(super) fn attach(
        &self,
        ebpf: &mut Ebpf,
        links: &Path,
        roots: &[(PodRoot, PathBuf)],
    ) -> Result<(), KernelError> {
        let mut attached = lock(&self.attached);
        for (root, folder) in roots {
            if attached.contains(&root.cgroup) {
                continue;
            }
            let folder = match File::open(folder) {
                Ok(folder) => folder,
                // Removed in the meantime.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let path = folder.clone();
                    return Err(KernelError::Pin { path, error });
                }
            };
            let gate: &mut CgroupSkb = program(ebpf, PROGRAM)?;
            let id = gate
                .attach(
                    folder,
                    CgroupSkbAttachType::Ingress,
                    CgroupAttachMode::Single,
                )
                .map_err(program_error(PROGRAM))?;
            let link = gate.take_link(id).map_err(program_error(PROGRAM))?;
            let link = link.try_into().map_err(link_error(PROGRAM))?;
            replace_pin(links, &pin(root.cgroup), link)?;
            attached.insert(root.cgroup);
        }
        let is_gone = |cgroup: &u64| roots.iter().all(|(root, _)| root.cgroup != *cgroup);
        for cgroup in attached.extract_if(is_gone) {
            // The kernel has detached the program with the cgroup.
            let _ = fs::remove_file(links.join(pin(cgroup)));
        }
        Ok(())
    }

    /// Waits until the kernel has reported a socket that a pod created in a closed netns. For one caller. Cancel-safe.
    pub async fn knocked(&self) {
        self.knocks.notified().await;
    }

    /// Cookies of the netns that are known to be outside the mesh, including those that a previous daemon wrote.
    pub fn outside(&self) -> HashSet<u64> {
        lock(&self.outside).keys().flatten().collect()
    }

    /// Opens the netns with `cookie`, which is known to be outside the mesh.
    pub fn open(&self, cookie: u64) -> Result<(), KernelError> {
        let inserted = lock(&self.outside).insert(cookie, 1, 0);
        inserted.map_err(map_error(MAP))
    }

    /// Undoes [`Gate::open`]. It is not an error if the netns is not open.
    pub fn close(&self, cookie: u64) -> Result<(), KernelError> {
        match lock(&self.outside).remove(&cookie) {
            Err(MapError::KeyNotFound) | Ok(()) => Ok(()),
            Err(error) => Err(map_error(MAP)(error)),
        }
    }
}

/// Name of the pin of the link to a cgroup.
fn pin(cgroup: u64) -> String {
    format!("{PROGRAM}-{cgroup}")
}
