//! Captures packets on the wire, or on the links of a node's pods.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType};
use nix::sys::socket::{recvfrom, setsockopt, socket, sockopt};

use crate::netns::Netns;
use crate::packet::Packet;
use crate::plumbing::{BRIDGE, NODE_LINK, POD_BRIDGE};
use crate::recording::Recording;

/// A running packet capture.
#[derive(Debug)]
pub struct Capture {
    socket: Arc<OwnedFd>,
    packets: Arc<Mutex<Vec<Packet>>>,
    orders: Arc<Orders>,
    reader: Option<JoinHandle<()>>,
}

/// Requests to the reader, and how far it has come.
#[derive(Debug, Default)]
struct Orders {
    stop: AtomicBool,
    /// How often all packets from before were requested.
    asked: AtomicU64,
    /// Of these, how many the reader has heard before it last read all packets.
    answered: AtomicU64,
}

impl Capture {
    /// Starts a capture on the wire, where each packet appears once. Packets are captured from the moment this returns.
    pub(crate) fn of_wire(netns: &Netns, kept: usize) -> Result<Self> {
        // Without this, every packet would also be delivered where it leaves the bridge.
        Self::start(netns, kept, &[BRIDGE], |socket| {
            ignore_outgoing(socket).context("leaving out what a packet socket sees twice")
        })
    }

    /// Starts a capture on the links of a node's pods, including those that are added later. What one pod sends to
    /// another appears once on each link.
    pub(crate) fn of_pods(node: &Netns) -> Result<Self> {
        let others = ["lo", NODE_LINK, POD_BRIDGE];
        Self::start(node, usize::MAX, &others, |_| Ok(()))
    }

    /// Captures on all interfaces of the namespace but these.
    fn start(
        netns: &Netns,
        kept: usize,
        without: &[&str],
        prepare: impl FnOnce(&OwnedFd) -> Result<()> + Send,
    ) -> Result<Self> {
        let (socket, without) = netns.enter(|| open(without, prepare))??;
        let socket = Arc::new(socket);
        let packets = Arc::new(Mutex::new(Vec::new()));
        let orders = Arc::<Orders>::default();
        let reader = thread::Builder::new()
            .name("capture".to_owned())
            .spawn({
                let (socket, packets, orders) = (
                    Arc::clone(&socket),
                    Arc::clone(&packets),
                    Arc::clone(&orders),
                );
                move || read(&socket, &without, kept, &packets, &orders)
            })
            .context("starting the thread of the capture")?;
        Ok(Self {
            socket,
            packets,
            orders,
            reader: Some(reader),
        })
    }

    /// Returns all packets captured before; the capture continues.
    pub fn so_far(&self) -> Recording {
        let asked = self.orders.asked.fetch_add(1, Ordering::AcqRel) + 1;
        while self.orders.answered.load(Ordering::Acquire) < asked {
            thread::sleep(Duration::from_millis(u64::from(STOP_LATENCY)));
        }
        Recording::new(
            self.packets
                .lock()
                .expect("no holder of this lock panics")
                .clone(),
        )
    }

    /// Stops the capture and returns all packets captured before. Returns an error if the kernel dropped packets.
    pub fn stop(mut self) -> Result<Recording> {
        self.end();
        let dropped = dropped(&self.socket)?;
        if dropped > 0 {
            return Err(anyhow!(
                "the capture lost {dropped} packets: its buffer was full"
            ));
        }
        Ok(Recording::new(std::mem::take(
            &mut *self.packets.lock().expect("no holder of this lock panics"),
        )))
    }

    fn end(&mut self) {
        self.orders.stop.store(true, Ordering::Release);
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

/// Opens a packet socket on all interfaces of the namespace. Also returns the indices of those to leave out.
fn open(
    without: &[&str],
    prepare: impl FnOnce(&OwnedFd) -> Result<()>,
) -> Result<(OwnedFd, Vec<usize>)> {
    // With the protocol given here the kernel delivers packets from now on; no bind is needed.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::EthAll,
    )
    .context("opening a packet socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)
        .context("enlarging the buffer of the packet socket")?;
    prepare(&socket)?;
    let index = |name: &&str| {
        let index = nix::net::if_::if_nametoindex(*name);
        index
            .map(|index| index as usize)
            .with_context(|| format!("finding the interface {name}"))
    };
    let without = without.iter().map(index).collect::<Result<_>>()?;
    Ok((socket, without))
}

fn read(
    socket: &OwnedFd,
    without: &[usize],
    kept: usize,
    packets: &Mutex<Vec<Packet>>,
    orders: &Orders,
) {
    let start = Instant::now();
    // Bytes that are not kept are not copied: recvfrom(2) truncates a packet at the end of its buffer.
    let mut frame = vec![0; kept.saturating_add(LONGEST_HEADERS).min(LONGEST_FRAME)];
    loop {
        // Read these before the socket is drained, so that all packets from before the stop, or the question, are read.
        let last = orders.stop.load(Ordering::Acquire);
        let asked = orders.asked.load(Ordering::Acquire);
        while let Ok((length, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
            if without.contains(&from.ifindex()) {
                continue;
            }
            if let Some(packet) = Packet::parse(&frame[..length], start.elapsed(), kept) {
                packets
                    .lock()
                    .expect("no holder of this lock panics")
                    .push(packet);
            }
        }
        orders.answered.store(asked, Ordering::Release);
        if last {
            return;
        }
        let _ = poll(
            &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
            PollTimeout::from(STOP_LATENCY),
        );
    }
}

/// Ignores outgoing packets (Linux 4.20).
fn ignore_outgoing(socket: &OwnedFd) -> Result<()> {
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads one c_int at the pointer, which is valid during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const yes).cast(),
            size_of_val(&yes) as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result)
        .map(drop)
        .context("setting PACKET_IGNORE_OUTGOING")
}

fn dropped(socket: &OwnedFd) -> Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `statistics`, which is plain data of that size and outlives the
    // call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result).context("reading the statistics of the packet socket")?;
    Ok(statistics.tp_drops)
}

/// Receive buffer in bytes. Memory is used only for packets that wait to be read.
const BUFFER: usize = 512 << 20;
/// In bytes. Segmentation is left to hardware that does not exist, so a frame is as long as an IP packet may be.
const LONGEST_FRAME: usize = 65_536 + 64;
/// In bytes: Ethernet, IPv4 or IPv6 with the extensions that occur with TCP, and TCP.
const LONGEST_HEADERS: usize = 192;
/// In milliseconds.
const STOP_LATENCY: u8 = 10;
