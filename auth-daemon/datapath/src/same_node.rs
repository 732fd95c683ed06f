//! Maps for connections between two pods of this node: verdicts and their lease, connections that are being
//! established, and events for closed connections.

use std::{io, net::SocketAddr, sync::Mutex, time::Duration};

use auth_common::{
    Admitted, Closed, FLOW_CLIENT, FLOW_SERVER, FourTuple, LEASE_NANOSECONDS, SocketKey, Verdict,
    WITHDRAWN, closed as flag,
};
use aya::{
    Ebpf,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, RingBuf},
};

use super::{
    Netns,
    events::Events,
    flows,
    kernel::{
        KernelError, lock, map_error, monotonic_nanoseconds, socket_address, take_map, wire_address,
    },
};

/// Flag of `bpf(2)`: only replace an entry that exists.
const BPF_EXIST: u64 = 2;

/// Access to the maps of same-node connections.
pub struct SameNode {
    verdicts: Mutex<BpfHashMap<MapData, SocketKey, Verdict>>,
    admitted: Mutex<BpfHashMap<MapData, FourTuple, Admitted>>,
    lease: Mutex<Array<MapData, u64>>,
    flows: MapData,
    lost: PerCpuArray<MapData, u64>,
    events: Mutex<Option<RingBuf<MapData>>>,
}

/// A verdict: the client in one netns may connect directly to `endpoint` when it dials `dialled`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Cookie of the client's netns.
    pub client_cookie: u64,
    /// Address that the client dials.
    pub dialled: SocketAddr,
    /// Endpoint that the connection is directed to.
    pub endpoint: SocketAddr,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// Identifies the verdict. Never reused.
    pub id: u64,
}

impl SameNode {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        fn open<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, KernelError>
        where
            T: TryFrom<Map, Error = MapError>,
        {
            T::try_from(take_map(ebpf, name)?).map_err(map_error(name))
        }
        Ok(Self {
            verdicts: Mutex::new(open(ebpf, "VERDICTS")?),
            admitted: Mutex::new(open(ebpf, "ADMITTED")?),
            lease: Mutex::new(open(ebpf, "LEASE")?),
            flows: match take_map(ebpf, "FLOWS")? {
                Map::SkStorage(flows) => flows,
                _ => {
                    let name = "FLOWS".to_owned();
                    return Err(map_error("FLOWS")(MapError::InvalidName { name }));
                }
            },
            lost: open(ebpf, "LOST")?,
            events: Mutex::new(Some(open(ebpf, "EVENTS")?)),
        })
    }

    /// Adds a verdict. Matching connections stay in the kernel for as long as the lease is valid.
    pub fn grant(&self, grant: &Grant) -> Result<(), KernelError> {
        let verdict = Verdict {
            endpoint: wire_address(grant.endpoint.ip()),
            server_cookie: grant.server_cookie,
            id: grant.id,
            port: grant.endpoint.port().into(),
            padding: 0,
        };
        lock(&self.verdicts)
            .insert(key(grant.client_cookie, grant.dialled), verdict, 0)
            .map_err(map_error("VERDICTS"))
    }

    /// Removes verdicts, each identified by its client's cookie and the dialled address. Their connections that are being
    /// established are not admitted any more.
    pub fn withdraw(&self, verdicts: &[(u64, SocketAddr)]) {
        let mut map = lock(&self.verdicts);
        for (cookie, dialled) in verdicts {
            let _ = map.remove(&key(*cookie, *dialled));
        }
        drop(map);
        self.sweep();
    }

    /// All verdicts, including those of a previous daemon.
    pub fn granted(&self) -> Vec<Grant> {
        lock(&self.verdicts)
            .iter()
            .flatten()
            .map(|(key, verdict)| Grant {
                client_cookie: key.netns_cookie,
                dialled: socket_address(key.address, key.port),
                endpoint: socket_address(verdict.endpoint, verdict.port),
                server_cookie: verdict.server_cookie,
                id: verdict.id,
            })
            .collect()
    }

    /// Marks the connections that are being established and whose verdict no longer exists. Only the programs remove entries,
    /// because they count them.
    fn sweep(&self) {
        let verdicts = lock(&self.verdicts);
        let mut admitted = lock(&self.admitted);
        let gone: Vec<_> = admitted
            .iter()
            .flatten()
            .filter(|(_, connection)| connection.verdict != WITHDRAWN)
            .filter(|(_, connection)| {
                let key = SocketKey {
                    netns_cookie: connection.client_cookie,
                    address: connection.dialled,
                    port: connection.dialled_port,
                    padding: 0,
                };
                verdicts
                    .get(&key, 0)
                    .map_or(true, |verdict| verdict.id != connection.verdict)
            })
            .collect();
        for (connection, entry) in gone {
            let withdrawn = Admitted {
                verdict: WITHDRAWN,
                ..entry
            };
            // It is an error if the entry has been removed, and then nothing is to be done.
            let _ = admitted.insert(connection, withdrawn, BPF_EXIST);
        }
    }

    /// Renews the lease: verdicts stay valid for [`LEASE_NANOSECONDS`] from now.
    pub fn renew_lease(&self) -> Result<(), KernelError> {
        self.lease_until(monotonic_nanoseconds() + LEASE_NANOSECONDS)
    }

    pub(super) fn flows(&self) -> &MapData {
        &self.flows
    }

    /// Ends the lease, so that no verdict is valid.
    pub fn end_lease(&self) -> Result<(), KernelError> {
        self.lease_until(0)
    }

    fn lease_until(&self, until: u64) -> Result<(), KernelError> {
        lock(&self.lease)
            .set(0, until, 0)
            .map_err(map_error("LEASE"))
    }

    /// Events for closed connections, starting with those that closed while no daemon was running. There is only one
    /// reader.
    pub fn closed(&self) -> io::Result<ClosedEvents> {
        let ring = lock(&self.events).take();
        let ring = ring.ok_or_else(|| io::Error::other("the events are being read already"))?;
        Ok(ClosedEvents(Events::new(ring)?))
    }

    /// Ends the connections that the kernel carries and that have their `side` in `netns`, if their verdict, client
    /// cookie and server cookie meet `condition`. The app on that side gets ECONNABORTED, the other one ECONNRESET.
    /// Returns the number of ended connections.
    pub fn end(
        &self,
        netns: &Netns,
        side: Side,
        condition: impl Fn(u64, u64, u64) -> bool,
    ) -> io::Result<usize> {
        flows::end(netns, &self.flows, &|flow| {
            let Admitted {
                verdict,
                client_cookie,
                server_cookie,
                ..
            } = flow.admitted;
            let role = match side {
                Side::Client => FLOW_CLIENT,
                Side::Server => FLOW_SERVER,
            };
            flow.role == role && condition(verdict, client_cookie, server_cookie)
        })
    }

    /// Number of closed connections whose event was lost, since the maps were created.
    pub fn lost(&self) -> u64 {
        self.lost.get(&0, 0).map_or(0, |counts| counts.iter().sum())
    }
}

impl std::fmt::Debug for SameNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SameNode").finish_non_exhaustive()
    }
}

fn key(client_cookie: u64, dialled: SocketAddr) -> SocketKey {
    SocketKey {
        netns_cookie: client_cookie,
        address: wire_address(dialled.ip()),
        port: dialled.port().into(),
        padding: 0,
    }
}

/// How long events are collected before the next read.
const GATHER: Duration = Duration::from_millis(10);

/// Stream of the events, registered with the runtime that created it.
pub struct ClosedEvents(Events);

impl ClosedEvents {
    /// Waits for events, passes each to `take`, and then sleeps for a moment, so that the events of that time wake the
    /// daemon only once.
    pub async fn next(&mut self, take: impl FnMut(Closing)) -> io::Result<()> {
        self.0.next(Closing::parse, take).await?;
        tokio::time::sleep(GATHER).await;
        Ok(())
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client's.
    Client,
    /// The server's.
    Server,
}

/// How a connection closed, as seen by one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Both directions ended, or this end's direction ended and its app did not wait for the other.
    InOrder,
    /// An established connection was cut off, for example by a RST.
    Reset,
    /// The connection was not established, because the server's kernel refused it.
    Refused,
    /// The connection was not established, because nobody answered or the app gave up.
    Unanswered,
}

/// Event for a connection that closed at one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closing {
    /// The end that closed.
    pub side: Side,
    /// Address of the client.
    pub client: SocketAddr,
    /// Address of the server.
    pub server: SocketAddr,
    /// Address that the client dialled.
    pub dialled: SocketAddr,
    /// Cookie of the client's netns.
    pub client_cookie: u64,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// Identifies the verdict.
    pub verdict: u64,
    /// Number of bytes from the client's app to the server's.
    pub to_server: u64,
    /// Number of bytes from the server's app to the client's.
    pub to_client: u64,
    /// Time from connect to close.
    pub duration: Duration,
    /// How the connection closed.
    pub ending: Ending,
    /// Whether a socket in the server's netns was seen to accept it. Only known at the client's end.
    pub claimed: bool,
}

// From the kernel's tcp_states.h.
const SYN_SENT: u8 = 2;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

impl Closing {
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Closed>() {
            return None;
        }
        // SAFETY: the length is that of a `Closed`, and every bit pattern is a valid `Closed`.
        let event = unsafe { bytes.as_ptr().cast::<Closed>().read_unaligned() };
        Self::from_event(&event)
    }

    /// Converts an event. TCP's byte counts include SYN and FINs, which are subtracted.
    fn from_event(event: &Closed) -> Option<Self> {
        let side = match u32::from(event.role) {
            FLOW_CLIENT => Side::Client,
            FLOW_SERVER => Side::Server,
            _ => return None,
        };
        let has = |bit| event.flags & bit != 0;
        // Whether this end's FIN was acknowledged. In the last states, the segment that closed the connection
        // acknowledges it.
        let own_fin = match event.state {
            FIN_WAIT2 => true,
            CLOSING | LAST_ACK => has(flag::ALL_ACKED) && has(flag::IN_ORDER),
            _ => false,
        };
        let peers_fin = match event.state {
            CLOSE_WAIT | CLOSING | LAST_ACK => true,
            FIN_WAIT2 => has(flag::FIN_RECEIVED),
            _ => false,
        };
        let ending = match event.state {
            SYN_SENT if has(flag::ANSWERED) => Ending::Refused,
            SYN_SENT => Ending::Unanswered,
            FIN_WAIT2 if peers_fin || has(flag::IN_ORDER) => Ending::InOrder,
            CLOSING | LAST_ACK if own_fin => Ending::InOrder,
            _ => Ending::Reset,
        };
        let syn = u64::from(side == Side::Client);
        let sent = event.acked.saturating_sub(syn + u64::from(own_fin));
        let received = event.received.saturating_sub(peers_fin.into());
        let (to_server, to_client) = match side {
            Side::Client => (sent, received),
            Side::Server => (received, sent),
        };
        let Admitted {
            dialled,
            client_cookie,
            server_cookie,
            verdict,
            started,
            dialled_port,
            ..
        } = event.admitted;
        Some(Self {
            side,
            client: socket_address(event.client, event.client_port.into()),
            server: socket_address(event.server, event.server_port.into()),
            dialled: socket_address(dialled, dialled_port),
            client_cookie,
            server_cookie,
            verdict,
            to_server,
            to_client,
            duration: Duration::from_nanos(event.ended.saturating_sub(started)),
            ending,
            claimed: !has(flag::UNCLAIMED),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: u8 = 1;
    const FIN_WAIT1: u8 = 4;

    fn event(role: u32, state: u8, flags: u16, acked: u64, received: u64) -> Closed {
        Closed {
            client: wire_address([10, 0, 0, 1].into()),
            server: wire_address([10, 0, 0, 2].into()),
            admitted: Admitted {
                dialled: wire_address([10, 96, 0, 1].into()),
                client_cookie: 1,
                server_cookie: 2,
                verdict: 3,
                started: 1_000_000,
                dialled_port: 80,
                padding: 0,
            },
            ended: 3_000_000,
            acked,
            received,
            client_port: 40000,
            server_port: 8080,
            role: role as u8,
            state,
            flags,
        }
    }

    fn of(event: &Closed) -> (u64, u64, Ending) {
        let closing = Closing::from_event(event).unwrap();
        (closing.to_server, closing.to_client, closing.ending)
    }

    #[test]
    fn syns_and_fins_are_not_the_apps() {
        let all = flag::ALL_ACKED | flag::IN_ORDER;
        for (event, expected) in [
            // The client ends first, then the server's FIN arrives.
            (
                event(FLOW_CLIENT, FIN_WAIT2, all | flag::FIN_RECEIVED, 12, 21),
                (10, 20, Ending::InOrder),
            ),
            // The client closes without waiting for the server.
            (
                event(FLOW_CLIENT, FIN_WAIT2, all, 12, 20),
                (10, 20, Ending::InOrder),
            ),
            // A RST instead of the server's FIN.
            (
                event(FLOW_CLIENT, FIN_WAIT2, flag::ALL_ACKED, 12, 20),
                (10, 20, Ending::Reset),
            ),
            // The server ends last, and its FIN is acknowledged.
            (
                event(FLOW_SERVER, LAST_ACK, all, 21, 11),
                (10, 20, Ending::InOrder),
            ),
            // The server's FIN was never sent: zero window, then a RST.
            (
                event(FLOW_SERVER, LAST_ACK, flag::ALL_ACKED, 20, 11),
                (10, 20, Ending::Reset),
            ),
            // Both ends close at once.
            (
                event(FLOW_CLIENT, CLOSING, all, 12, 21),
                (10, 20, Ending::InOrder),
            ),
            // A RST in an established connection, and in one that the other side has ended.
            (
                event(FLOW_CLIENT, ESTABLISHED, 0, 11, 20),
                (10, 20, Ending::Reset),
            ),
            (
                event(FLOW_SERVER, CLOSE_WAIT, 0, 20, 11),
                (10, 20, Ending::Reset),
            ),
            // This end's FIN was never sent, although everything that was sent is acknowledged.
            (
                event(FLOW_CLIENT, FIN_WAIT1, flag::ALL_ACKED, 11, 20),
                (10, 20, Ending::Reset),
            ),
            (
                event(FLOW_CLIENT, SYN_SENT, flag::ANSWERED, 0, 0),
                (0, 0, Ending::Refused),
            ),
            (
                event(FLOW_CLIENT, SYN_SENT, 0, 0, 0),
                (0, 0, Ending::Unanswered),
            ),
        ] {
            assert_eq!(of(&event), expected, "{event:?}");
        }
    }

    #[test]
    fn events_are_checked() {
        let event = event(FLOW_CLIENT, ESTABLISHED, flag::UNCLAIMED, 1, 0);
        // SAFETY: `Closed` consists of plain integers without padding.
        let bytes: [u8; size_of::<Closed>()] = unsafe { std::mem::transmute(event) };
        let closing = Closing::parse(&bytes).unwrap();
        assert_eq!(closing.client, "10.0.0.1:40000".parse().unwrap());
        assert_eq!(closing.server, "10.0.0.2:8080".parse().unwrap());
        assert_eq!(closing.dialled, "10.96.0.1:80".parse().unwrap());
        assert_eq!(closing.duration, Duration::from_millis(2));
        assert!(!closing.claimed);
        assert_eq!(Closing::parse(&bytes[1..]), None);
        let nobodys = Closed { role: 7, ..event };
        assert_eq!(Closing::from_event(&nobodys), None);
    }
}
