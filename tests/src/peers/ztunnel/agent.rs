//! The part of istio-cni's node agent that ztunnel needs: it sends ztunnel each pod with the pod's namespace over a
//! packet socket (`zds.proto`, version 1).

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen,
    sendmsg, socket,
};
use prost::Message;

use crate::eventually::{TIMEOUT, eventually_ok};
use crate::pod::Pod;
use crate::process::Process;

/// A pod, as described to ztunnel.
pub(super) struct Workload {
    uid: String,
    info: WorkloadInfo,
    netns: PathBuf,
}

impl From<&Pod> for Workload {
    fn from(pod: &Pod) -> Self {
        Self {
            uid: pod.uid().to_owned(),
            info: WorkloadInfo {
                name: pod.name().to_owned(),
                namespace: pod.namespace().to_owned(),
                service_account: pod.spec().account().to_owned(),
            },
            netns: pod.place().netns().path(),
        }
    }
}

/// The socket where ztunnel requests its pods.
#[derive(Debug)]
pub(super) struct Agent {
    listener: UnixListener,
    /// Stays open: ztunnel without an agent is not ready.
    stream: Option<UnixStream>,
}

impl Agent {
    /// Listens at a path, also if a previous agent did.
    pub(super) fn listen(path: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(path);
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket: OwnedFd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .context("making a socket")?;
        let listening = UnixAddr::new(path)
            .and_then(|address| bind(socket.as_raw_fd(), &address))
            .and_then(|()| listen(&socket, Backlog::new(1)?));
        listening.with_context(|| format!("listening at {}", path.display()))?;
        Ok(Self {
            listener: socket.into(),
            stream: None,
        })
    }

    /// Waits until a ztunnel connects and sends it the pods.
    ///
    /// # Errors
    /// If ztunnel closes the connection early, sends an unexpected message, or rejects a pod.
    pub(super) fn introduce(
        &mut self,
        pods: impl IntoIterator<Item = Workload>,
        ztunnel: &mut Process,
    ) -> Result<()> {
        let mut stream = eventually_ok(TIMEOUT, "ztunnel to ask for its pods", || {
            if let Some(status) = ztunnel.ended()? {
                return Ok(Err(anyhow!("it ended with {status}")));
            }
            let (stream, _) = self.listener.accept()?;
            Ok(Ok(stream))
        })??;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let Hello { version } = receive(&mut stream)?;
        ensure!(version == VERSION, "it speaks version {version}");
        for pod in pods {
            add(&mut stream, &pod).with_context(|| format!("telling of {}", pod.info.name))?;
        }
        let end = Request {
            snapshot_sent: Some(SnapshotSent {}),
            ..Request::default()
        };
        stream.write_all(&end.encode_to_vec())?;
        acknowledged(&mut stream).context("sending the end of the list of pods")?;
        self.stream = Some(stream);
        Ok(())
    }
}

fn add(stream: &mut UnixStream, pod: &Workload) -> Result<()> {
    let request = Request {
        add: Some(AddWorkload {
            uid: pod.uid.clone(),
            workload_info: Some(pod.info.clone()),
        }),
        ..Request::default()
    };
    let netns =
        File::open(&pod.netns).with_context(|| format!("opening {}", pod.netns.display()))?;
    let bytes = request.encode_to_vec();
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[ControlMessage::ScmRights(&[netns.as_raw_fd()])],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    // A packet is sent as a whole or not at all.
    ensure!(sent == bytes.len(), "{sent} of {} bytes", bytes.len());
    acknowledged(stream)
}

fn acknowledged(stream: &mut UnixStream) -> Result<()> {
    let response: Response = receive(stream)?;
    match response.ack {
        Some(ack) if ack.error.is_empty() => Ok(()),
        Some(ack) => bail!("it says: {}", ack.error),
        None => bail!("it sent an unknown message"),
    }
}

fn receive<M: Message + Default>(stream: &mut UnixStream) -> Result<M> {
    let mut packet = [0; 4096];
    let length = stream.read(&mut packet).context("waiting for its answer")?;
    ensure!(length > 0, "it hung up");
    Ok(M::decode(&packet[..length])?)
}

/// The first packet, sent by ztunnel.
#[derive(Clone, PartialEq, Message)]
struct Hello {
    #[prost(int32, tag = "1")]
    version: i32,
}

/// One of both; answered by a [`Response`].
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(message, optional, tag = "1")]
    add: Option<AddWorkload>,
    #[prost(message, optional, tag = "3")]
    snapshot_sent: Option<SnapshotSent>,
}

/// A pod, with the descriptor of its namespace in the packet's ancillary data.
#[derive(Clone, PartialEq, Message)]
struct AddWorkload {
    #[prost(string, tag = "1")]
    uid: String,
    #[prost(message, optional, tag = "2")]
    workload_info: Option<WorkloadInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct WorkloadInfo {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    service_account: String,
}

/// Marks the end of the initial list of pods.
#[derive(Clone, PartialEq, Message)]
struct SnapshotSent {}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    ack: Option<Ack>,
}

#[derive(Clone, PartialEq, Message)]
struct Ack {
    /// Empty on success.
    #[prost(string, tag = "1")]
    error: String,
}

const VERSION: i32 = 1;

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::os::fd::RawFd;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::thread;

    use nix::sys::socket::{ControlMessageOwned, connect, recvmsg};

    use super::*;

    /// Acts as ztunnel: sends the greeting and acknowledges each packet. Returns what it received, with the namespaces'
    /// inodes.
    fn ztunnel(path: &Path, errors: &[&str]) -> Vec<(Request, Vec<u64>)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        let mut stream = UnixStream::from(socket);
        let hello = Hello { version: VERSION };
        stream.write_all(&hello.encode_to_vec()).unwrap();
        let mut packets = Vec::new();
        for error in errors {
            let (mut packet, mut space) = ([0; 1024], nix::cmsg_space!([RawFd; 2]));
            let mut slices = [IoSliceMut::new(&mut packet)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let got = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags);
            let got = got.unwrap();
            let rights = got.cmsgs().unwrap().flat_map(|message| match message {
                ControlMessageOwned::ScmRights(all) => all,
                other => panic!("{other:?}"),
            });
            let inodes = rights.map(|right| {
                let path = format!("/proc/self/fd/{right}");
                let inode = std::fs::metadata(path).unwrap().ino();
                nix::unistd::close(right).unwrap();
                inode
            });
            let inodes = inodes.collect();
            let length = got.bytes;
            packets.push((Request::decode(&packet[..length]).unwrap(), inodes));
            let ack = Some(Ack {
                error: (*error).to_owned(),
            });
            let answer = Response { ack }.encode_to_vec();
            stream.write_all(&answer).unwrap();
        }
        packets
    }

    /// Sends two pods to such a ztunnel.
    fn introduced(name: &str, errors: &'static [&str]) -> (Result<()>, Vec<(Request, Vec<u64>)>) {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let mut agent = Agent::listen(&path).unwrap();
        let called = path.clone();
        let ztunnel = thread::spawn(move || ztunnel(&called, errors));
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut process = Process::spawn(command).unwrap();
        let pods = ["web", "near"].map(|name| Workload {
            uid: format!("uid-{name}"),
            info: WorkloadInfo {
                name: name.to_owned(),
                namespace: "default".to_owned(),
                service_account: "account".to_owned(),
            },
            netns: "/proc/self/ns/net".into(),
        });
        let result = agent.introduce(pods, &mut process);
        std::fs::remove_file(&path).unwrap();
        (result, ztunnel.join().unwrap())
    }

    #[test]
    fn sends_each_pod_with_its_namespace_and_then_the_end() {
        let (result, packets) = introduced("all-well", &["", "", ""]);
        result.unwrap();
        let own = std::fs::metadata("/proc/self/ns/net").unwrap().ino();
        for ((request, inodes), name) in packets.iter().zip(["web", "near"]) {
            let add = request.add.clone().unwrap();
            assert_eq!(add.uid, format!("uid-{name}"));
            assert_eq!(add.workload_info.unwrap().name, name);
            assert_eq!(*inodes, [own]);
        }
        let (end, inodes) = &packets[2];
        assert!(end.add.is_none() && end.snapshot_sent.is_some() && inodes.is_empty());
    }

    #[test]
    fn a_pod_that_is_refused_is_named() {
        let (result, _) = introduced("refused", &["", "no such luck"]);
        let error = format!("{:#}", result.unwrap_err());
        assert_eq!(error, "telling of near: it says: no such luck");
    }
}
