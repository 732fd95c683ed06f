//! The inbound program of an enrolled netns: which listener a SYN reaches.

use std::{net::TcpListener, os::fd::AsFd, sync::Mutex};

use auth_common::Inbound;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, SockMap},
    programs::{SkLookup, links::FdLink},
};
use socket2::SockRef;

use super::{
    KernelError, Netns,
    kernel::{lock, map_error, program, program_error, take_map},
};

/// The compiled program.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("AUTH_EBPF_INBOUND"));
/// Name of the program.
pub(super) const PROGRAM: &str = "inbound";

/// An instance of the inbound program, which is attached to one netns. The link keeps the program and its maps alive in the
/// kernel, also without a daemon: the mode stays, and the listener is removed with its socket.
pub(super) struct InboundProgram {
    state: Mutex<State>,
}

struct State {
    mode: Array<MapData, u32>,
    tunnel: SockMap<MapData>,
    /// Content of the maps: the mode, and the cookie of the listener's socket, which is never used again, unlike the number
    /// of a descriptor. `None`: all connections are refused, except those that the kernel has recorded.
    admits: Option<(Inbound, u64)>,
}

impl InboundProgram {
    /// Attaches an instance to `netns`, beside any that is attached already. `loader` knows the pins of the maps that the
    /// program shares with those of the cgroup root. `admits` is the pod's mode, and its tunnel listener; see
    /// [`InboundProgram::admit`].
    pub(super) fn attach(
        loader: &mut EbpfLoader<'_>,
        netns: &Netns,
        admits: Option<(Inbound, &TcpListener)>,
    ) -> Result<(Self, FdLink), KernelError> {
        let mut ebpf = load(loader)?;
        let mode = Array::try_from(take_map(&mut ebpf, "MODE")?).map_err(map_error("MODE"))?;
        let tunnel =
            SockMap::try_from(take_map(&mut ebpf, "TUNNEL")?).map_err(map_error("TUNNEL"))?;
        let instance = Self {
            state: Mutex::new(State {
                mode,
                tunnel,
                admits: None,
            }),
        };
        if let Some((mode, listener)) = admits {
            instance.admit(mode, listener)?;
        }
        let program: &mut SkLookup = program(&mut ebpf, PROGRAM)?;
        let id = program
            .attach(netns.as_fd())
            .map_err(program_error(PROGRAM))?;
        let link = program.take_link(id).map_err(program_error(PROGRAM))?;
        Ok((instance, link.into()))
    }

    /// Sends connections to `listener`, the pod's tunnel listener, according to `mode`.
    pub(super) fn admit(&self, mode: Inbound, listener: &TcpListener) -> Result<(), KernelError> {
        let mut state = lock(&self.state);
        let cookie = SockRef::from(listener).cookie();
        // Without a cookie, the maps are written each time.
        let admits = cookie.ok().map(|cookie| (mode, cookie));
        if admits.is_some() && state.admits == admits {
            return Ok(());
        }
        state.admits = None;
        // The listener first: a mode without a listener refuses.
        state
            .tunnel
            .set(0, listener, 0)
            .map_err(map_error("TUNNEL"))?;
        state
            .mode
            .set(0, mode as u32, 0)
            .map_err(map_error("MODE"))?;
        state.admits = admits;
        Ok(())
    }

    /// Refuses all connections, except those that the kernel has recorded.
    pub(super) fn refuse(&self) -> Result<(), KernelError> {
        let mut state = lock(&self.state);
        state.admits = None;
        state
            .mode
            .set(0, Inbound::Strict as u32, 0)
            .map_err(map_error("MODE"))?;
        // It is an error if there is no listener, and then nothing is to be done.
        let _ = state.tunnel.clear_index(&0);
        Ok(())
    }
}

impl std::fmt::Debug for InboundProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InboundProgram")
            .field("admits", &lock(&self.state).admits)
            .finish()
    }
}

/// Loads and verifies an instance without attaching it. Maps that `loader` knows no pin of are the instance's own.
pub(super) fn load(loader: &mut EbpfLoader<'_>) -> Result<Ebpf, KernelError> {
    let mut ebpf = loader.load(OBJECT)?;
    program::<SkLookup>(&mut ebpf, PROGRAM)?
        .load()
        .map_err(program_error(PROGRAM))?;
    Ok(ebpf)
}
