//! Loads the programs of the cgroup root and of pods' interfaces, and attaches those of the cgroup root.

use std::fs::File;

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSock, CgroupSockAddr, SchedClassifier, SockOps,
        links::FdLink,
    },
};

use super::{
    KernelError,
    error::{link_error, program_error},
};
use crate::{forwarding, gate, inbound};

/// The compiled eBPF programs.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("AUTH_EBPF"));

const CGROUP_PROGRAMS: [&str; 8] = [
    "connect4",
    "connect6",
    "getpeername4",
    "getpeername6",
    "getsockname4",
    "getsockname6",
    "sendmsg4",
    "sendmsg6",
];
const SOCK_OPS_PROGRAM: &str = "established";
const SOCK_PROGRAM: &str = "first_socket";

/// Loads and verifies the programs without attaching or pinning them, then drops them. Returns the kernel's errors.
pub fn try_load() -> Vec<KernelError> {
    let mut loader = loader();
    let mut ebpf = match loader.load(OBJECT) {
        Ok(ebpf) => ebpf,
        Err(error) => return vec![error.into()],
    };
    programs()
        .filter_map(|name| load_program(&mut ebpf, name).err())
        .chain(inbound::load(&mut loader).err())
        .collect()
}

/// Creates a loader. A new one reads the types of the kernel, which takes 20 ms, and these programs refer to none.
pub(super) fn loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

pub(super) fn programs() -> impl Iterator<Item = &'static str> {
    cgroup_programs().chain([gate::PROGRAM, forwarding::PROGRAM])
}

pub(super) fn cgroup_programs() -> impl Iterator<Item = &'static str> {
    let others = [SOCK_OPS_PROGRAM, SOCK_PROGRAM];
    CGROUP_PROGRAMS.into_iter().chain(others)
}

pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), KernelError> {
    let loaded = match name {
        SOCK_OPS_PROGRAM => program::<SockOps>(ebpf, name)?.load(),
        SOCK_PROGRAM => program::<CgroupSock>(ebpf, name)?.load(),
        gate::PROGRAM => program::<CgroupSkb>(ebpf, name)?.load(),
        forwarding::PROGRAM => program::<SchedClassifier>(ebpf, name)?.load(),
        _ => program::<CgroupSockAddr>(ebpf, name)?.load(),
    };
    loaded.map_err(program_error(name))
}

/// The newest kernel feature that a program needs.
pub(super) fn needs(program: &str) -> &'static str {
    match program {
        forwarding::PROGRAM => "cls_bpf (CONFIG_NET_CLS_BPF)",
        inbound::PROGRAM => "ingress_ifindex in sk_lookup, which came with Linux 5.17",
        SOCK_OPS_PROGRAM => "bpf_get_netns_cookie in sockops, which came with Linux 5.15",
        SOCK_PROGRAM => {
            "ring buffers and socket storage in cgroup/sock_create, which came with Linux 5.8"
        }
        gate::PROGRAM => "socket storage in cgroup_skb, which came with Linux 5.2",
        _ => "cgroup/getpeername, getsockname and socket storage there, which came with Linux 5.8",
    }
}

pub(super) fn attach_to_cgroup(
    ebpf: &mut Ebpf,
    name: &str,
    cgroup: &File,
) -> Result<FdLink, KernelError> {
    let mode = CgroupAttachMode::Single;
    if name == SOCK_OPS_PROGRAM {
        let program: &mut SockOps = program(ebpf, name)?;
        let id = program.attach(cgroup, mode).map_err(program_error(name))?;
        let link = program.take_link(id).map_err(program_error(name))?;
        return link.try_into().map_err(link_error(name));
    }
    if name == SOCK_PROGRAM {
        let program: &mut CgroupSock = program(ebpf, name)?;
        let id = program.attach(cgroup, mode).map_err(program_error(name))?;
        let link = program.take_link(id).map_err(program_error(name))?;
        return link.try_into().map_err(link_error(name));
    }
    let program: &mut CgroupSockAddr = program(ebpf, name)?;
    let id = program.attach(cgroup, mode).map_err(program_error(name))?;
    let link = program.take_link(id).map_err(program_error(name))?;
    link.try_into().map_err(link_error(name))
}

pub(crate) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program>,
{
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or_else(|| KernelError::Missing(format!("program {name}")))
}
