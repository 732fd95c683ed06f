//! Malicious TCP and TLS peers on the wire, from a host that is not in the mesh.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use etherparse::PacketBuilder;
use mesh_tests::{Place, Result};
use nix::libc::IPPROTO_RAW;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ConnectionTrafficSecrets};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::common::authority::{Authority, Presented};
use crate::common::hostile::{
    ALPN, CONNECTED, DATA, END, Peer, client_config, connect_frame, frame,
};
use crate::stage::Stage;

/// Seconds of each attack.
const SECONDS: u64 = 2;
/// Threads of an attack.
const THREADS: usize = 2;
/// Timeout of an attacker's step, so that an attack ends soon.
const STEP: Duration = Duration::from_secs(10);
/// Connections that a thread of the stalling attack holds.
const STALLED: usize = 300;

/// What each attack repeats, with the connections that it holds. Fails if it does not reach the step that it attempts.
type Round = fn(&Attacker, &mut Vec<TcpStream>) -> Result<()>;

const ATTACKS: [(&str, Round); 10] = [
    ("SYNs from many addresses", syns),
    ("connections that end at once", ends_at_once),
    ("handshakes that stall at each message", stalls),
    ("ClientHellos that cost nothing", hellos),
    ("records of one byte", small_records),
    ("key updates", key_updates),
    ("empty records", empty_records),
    ("a certificate chain of 10 MB", long_chain),
    ("tunnels that carry one connection each", new_tunnels),
    ("a connection after the other in one tunnel", reused_tunnel),
];

#[test]
fn malicious_peers_do_not_make_a_pods_neighbours_fail() -> Result<()> {
    let mut stage = Stage::set()?;
    let _sink = stage
        .target
        .app(&format!("sink --port {SINK}"))?
        .listening()?;
    let attacker = Arc::new(Attacker::new(&stage)?);
    let quiet = stage.measure()?;
    let before = stage.snapshots()?;
    let measure = |name, round| {
        let attack = Attack::start(&attacker, round);
        let attacked = stage.measure_for(SECONDS)?;
        let rounds = attack.stop()?;
        println!("{name}: {rounds} rounds");
        attacked.print_ratio("quiet", &quiet);
        attacked.ensure_fair(&quiet)?;
        ensure!(rounds > 0, "{name}: no round was complete");
        Ok(attacked)
    };
    // On this machine, the attacker takes the daemons' processors, too.
    let computing = measure("an attacker that only computes", computes)?;
    for (name, round) in ATTACKS {
        measure(name, round)?.print_ratio("computing", &computing);
    }
    stage.assert_recovered(&before)?;
    stage.measure().map(drop)
}

/// A host on the wire with a certificate that the mesh trusts.
struct Attacker {
    place: Place,
    address: Ipv4Addr,
    /// The attacked pod's sink.
    to: SocketAddr,
    config: ClientConfig,
    with_long_chain: ClientConfig,
    /// A ClientHello.
    hello: Vec<u8>,
    raw: Socket,
    next: AtomicU16,
}

impl Attacker {
    fn new(stage: &Stage) -> Result<Self> {
        let authority = Authority::stolen(&stage.mesh.node("a").ca_folder())?;
        let own = authority.mint("attacker")?;
        let padding = authority.mint("padding")?.chain.remove(0);
        let count = (10 << 20) / padding.len();
        let long = Presented {
            chain: [own.chain.clone(), vec![padding; count]].concat(),
            ..own.clone()
        };
        let config = |presented| {
            let mut config = client_config(Some(presented), &[ALPN])?;
            config.enable_secret_extraction = true;
            Ok::<_, anyhow::Error>(config)
        };
        let to = stage.target.at(SINK);
        let place = stage.mesh.outside().clone();
        let raw = place
            .enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW))))??;
        Ok(Self {
            address: stage.mesh.outside_ipv4(),
            to,
            hello: client_hello(config(&own)?, to)?,
            config: config(&own)?,
            with_long_chain: config(&long)?,
            place,
            raw,
            next: AtomicU16::new(0),
        })
    }

    /// Connects, from a thread in the attacker's netns.
    fn dial(&self) -> Result<TcpStream> {
        let tcp = TcpStream::connect_timeout(&self.to, STEP)?;
        tcp.set_read_timeout(Some(STEP))?;
        tcp.set_write_timeout(Some(STEP))?;
        Ok(tcp)
    }

    /// A tunnel, before its first CONNECT.
    fn tunnel(&self) -> Result<Peer> {
        Ok(Peer::client(self.dial()?, self.config.clone())?)
    }

    /// A tunnel with an open connection to the sink.
    fn connection(&self) -> Result<Peer> {
        let mut peer = self.tunnel()?;
        self.connect(&mut peer)?;
        Ok(peer)
    }

    fn connect(&self, peer: &mut Peer) -> Result<()> {
        let port = 1024 + self.next.fetch_add(1, Ordering::Relaxed) % 20_000;
        peer.send(&connect_frame(self.to, (self.address, port).into()))?;
        match peer.frame()? {
            Some((CONNECTED, _)) => Ok(()),
            other => bail!("{other:?} instead of CONNECTED"),
        }
    }
}

/// Returns the first message of a handshake with the server at `to`.
fn client_hello(config: ClientConfig, to: SocketAddr) -> Result<Vec<u8>> {
    let name = ServerName::IpAddress(to.ip().into());
    let mut tls = ClientConnection::new(Arc::new(config), name)?;
    let mut hello = Vec::new();
    tls.write_tls(&mut hello)?;
    Ok(hello)
}

/// An attack that goes on until it is stopped.
struct Attack {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Attack {
    fn start(attacker: &Arc<Attacker>, round: Round) -> Self {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let run = || {
            let (attacker, stop, rounds) = (attacker.clone(), stop.clone(), rounds.clone());
            thread::spawn(move || {
                attacker.place.enter(|| {
                    let mut held = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        // The daemon may refuse any step.
                        if round(&attacker, &mut held).is_ok() {
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
        };
        let threads = (0..THREADS).map(|_| run()).collect();
        Self {
            stop,
            rounds,
            threads,
        }
    }

    /// Returns the number of rounds that were complete.
    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().ok().context("an attacker panicked")??;
        }
        Ok(self.rounds.load(Ordering::Relaxed))
    }
}

/// Computes as for handshakes, but sends nothing.
fn computes(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    client_hello(attacker.config.clone(), attacker.to).map(drop)
}

/// A thousand SYNs from addresses of the attacker's network, most of which nobody has.
fn syns(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let SocketAddr::V4(to) = attacker.to else {
        bail!("the attacked pod has no IPv4 address");
    };
    for _ in 0..1000 {
        let number = attacker.next.fetch_add(1, Ordering::Relaxed);
        let mut from = attacker.address.octets();
        from[3] = 20 + (number % 200) as u8;
        let mut packet = Vec::new();
        PacketBuilder::ipv4(from, to.ip().octets(), 64)
            .tcp(1024 + number % 60_000, to.port(), u32::from(number), 65_000)
            .syn()
            .write(&mut packet, &[])?;
        // The queue of packets may be full.
        let _ = attacker.raw.send_to(&packet, &SockAddr::from(to));
    }
    Ok(())
}

fn ends_at_once(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    attacker.dial().map(drop)
}

/// One handshake that stalls at each point. The oldest are replaced.
fn stalls(attacker: &Attacker, held: &mut Vec<TcpStream>) -> Result<()> {
    if held.len() >= STALLED {
        held.drain(..4);
    }
    let hello = &attacker.hello;
    for bytes in [&[][..], &hello[..hello.len() / 2], hello] {
        let mut tcp = attacker.dial()?;
        tcp.write_all(bytes)?;
        held.push(tcp);
    }
    held.push(attacker.tunnel()?.tcp);
    Ok(())
}

/// The same ClientHello on many connections, so that only the daemon computes. The oldest are replaced.
fn hellos(attacker: &Attacker, held: &mut Vec<TcpStream>) -> Result<()> {
    if held.len() >= STALLED {
        held.drain(..50);
    }
    for _ in 0..50 {
        let mut tcp = attacker.dial()?;
        tcp.write_all(&attacker.hello)?;
        held.push(tcp);
    }
    Ok(())
}

fn small_records(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let mut peer = attacker.connection()?;
    for byte in frame(DATA, &[7; 5000]) {
        peer.send(&[byte])?;
    }
    Ok(())
}

/// More key updates in a row than the daemon takes.
fn key_updates(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let mut peer = attacker.connection()?;
    for _ in 0..1000 {
        if peer.update_keys().is_err() {
            return Ok(());
        }
    }
    ended(&peer.tcp)
}

/// More empty records in a row than the daemon takes.
fn empty_records(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let Peer { tls, mut tcp, .. } = attacker.connection()?;
    let (mut sequence, secrets) = tls.dangerous_extract_secrets()?.tx;
    let ConnectionTrafficSecrets::Aes256Gcm { key, iv } = secrets else {
        bail!("not the cipher suite that was expected");
    };
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref())?);
    let mut records = Vec::new();
    for _ in 0..1000 {
        // RFC 8446, section 5.2: the header, and the content type behind no content.
        let header = [23, 3, 3, 0, 17];
        let mut nonce = *iv.as_ref().first_chunk::<12>().context("a nonce")?;
        for (byte, of) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= of;
        }
        let mut sealed = vec![23];
        let nonce = Nonce::assume_unique_for_key(nonce);
        key.seal_in_place_append_tag(nonce, Aad::from(header), &mut sealed)?;
        records.extend_from_slice(&header);
        records.extend_from_slice(&sealed);
        sequence += 1;
    }
    match tcp.write_all(&records) {
        Ok(()) => ended(&tcp),
        Err(_) => Ok(()),
    }
}

/// Waits until the daemon has ended the connection.
fn ended(mut tcp: &TcpStream) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match tcp.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("the connection goes on")
            }
            Err(_) => return Ok(()),
        }
    }
}

/// Larger than what the daemon takes, which refuses it while it arrives.
fn long_chain(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let tcp = attacker.dial()?;
    let watch = tcp.try_clone()?;
    match Peer::client(tcp, attacker.with_long_chain.clone()) {
        Ok(_) => ended(&watch),
        Err(_) => Ok(()),
    }
}

fn new_tunnels(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let mut peer = attacker.connection()?;
    peer.send(&frame(END, b""))?;
    Ok(peer.close_notify()?)
}

fn reused_tunnel(attacker: &Attacker, _: &mut Vec<TcpStream>) -> Result<()> {
    let mut peer = attacker.tunnel()?;
    for _ in 0..100 {
        attacker.connect(&mut peer)?;
        peer.send(&frame(END, b""))?;
        // The sink answers with the number of bytes, and ends.
        while let Some((kind, _)) = peer.frame()?
            && kind != END
        {}
    }
    Ok(())
}

const SINK: u16 = 7001;
