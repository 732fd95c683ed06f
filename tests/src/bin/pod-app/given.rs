//! Sockets that one process gives to another (SCM_RIGHTS, unix(7)).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use clap::Args;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::report::{At, Failure, Outcome, event};

/// Makes a TCP socket, and gives it to the first process that connects to a Unix socket.
#[derive(Debug, Clone, Args)]
pub(crate) struct GiveSocket {
    /// Path of the Unix socket
    #[arg(long)]
    at: PathBuf,
    /// Make an IPv6 socket
    #[arg(long)]
    v6: bool,
}

impl GiveSocket {
    pub(crate) fn run(self) -> Outcome {
        let domain = if self.v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).at("socket")?;
        let listener = UnixListener::bind(&self.at).at("bind")?;
        event("listening", json!({"path": self.at}));
        let (taker, _) = listener.accept().at("accept")?;
        let sockets = [socket.as_raw_fd()];
        sendmsg::<UnixAddr>(
            taker.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &[ControlMessage::ScmRights(&sockets)],
            MsgFlags::empty(),
            None,
        )
        .at("sendmsg")?;
        Ok(json!({}))
    }
}

/// Returns the socket that a `give-socket` gives away at `path`.
pub(crate) fn receive(path: &Path) -> Result<Socket, Failure> {
    let giver = UnixStream::connect(path).at("connect to the giver")?;
    let mut space = cmsg_space!([i32; 1]);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<UnixAddr>(
        giver.as_raw_fd(),
        &mut bytes,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .at("recvmsg")?;
    for control in message.cmsgs().at("recvmsg")? {
        if let ControlMessageOwned::ScmRights(sockets) = control
            && let [socket] = sockets[..]
        {
            // SAFETY: the kernel has just made this descriptor for this process, and nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(socket) }.into());
        }
    }
    Err(Failure::new("recvmsg", Errno::EBADMSG))
}
