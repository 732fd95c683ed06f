//! Servers with a valid certificate that violate the protocol inside the tunnel: the app gets an error in bounded time,
//! and never an answer that looks complete.

use std::io;

use crate::common::hostile::{
    ALPN, CONNECT, CONNECTED, DATA, END, Faults, Peer, RESET, frame, frame_of_length, server_config,
};
use crate::common::servers::{case, hold, mesh, run, unharmed};
use mesh_tests::{Result, Snapshot};

#[test]
fn app_gets_an_error_from_servers_that_violate_the_protocol() -> Result<()> {
    let (mesh, daemon, stolen) = mesh()?;
    let before = Snapshot::take(&daemon, &[mesh.pod("client").place()])?;
    let presented = stolen.mint("web")?;
    // After CONNECT, sends this, and then holds the connection open or ends it.
    let answering = |what, expected, bytes: Vec<u8>, then: fn(&mut Peer) -> io::Result<()>| {
        let presented = presented.clone();
        case(what, expected, move |tcp| {
            let config = server_config(&presented, &[ALPN]).map_err(io::Error::other)?;
            let mut peer = Peer::server(tcp, config)?;
            peer.frame()?;
            peer.send(&bytes)?;
            then(&mut peer)
        })
    };
    let hold: fn(&mut Peer) -> io::Result<()> = |peer| hold(&peer.tcp);
    // The client's bytes up to here are not echoed.
    let close: fn(&mut Peer) -> io::Result<()> = |peer| {
        peer.close_notify()?;
        self::hold(&peer.tcp)
    };
    let finish: fn(&mut Peer) -> io::Result<()> = |peer| peer.finish_tcp();
    let connected = |more: &[u8]| [frame(CONNECTED, b""), more.to_vec()].concat();
    let end = frame(END, b"");
    let refused = |reason| ("refused", reason);
    let reset = |reason| ("reset", reason);
    let reason = [&[4][..], b"\x1b[2J\r\nforged line"].concat();
    let cases = vec![
        answering("never answers the CONNECT", refused("answer"), vec![], hold),
        answering(
            "sends garbage for CONNECTED",
            refused("unknown frame type"),
            vec![0x99; 100],
            hold,
        ),
        answering(
            "sends DATA before CONNECTED",
            refused("DATA out of turn"),
            frame(DATA, b"x"),
            hold,
        ),
        answering(
            "sends END before CONNECTED",
            refused("out of turn"),
            end.clone(),
            hold,
        ),
        answering(
            "sends CONNECT itself",
            refused("malformed CONNECT"),
            frame(CONNECT, b"\x01xx"),
            hold,
        ),
        answering(
            "CONNECTED with a payload",
            refused("length 1"),
            frame(CONNECTED, b"x"),
            hold,
        ),
        answering(
            "a length of 2^32-1",
            refused("length 4294967295"),
            frame_of_length(CONNECTED, u32::MAX, b""),
            hold,
        ),
        answering(
            "RESET with control characters",
            refused("forbids it"),
            frame(RESET, &reason),
            hold,
        ),
        answering(
            "close_notify for CONNECTED",
            refused("closed the tunnel"),
            vec![],
            close,
        ),
        answering(
            "the end for CONNECTED",
            refused("closed the tunnel"),
            vec![],
            finish,
        ),
        answering(
            "a broken record for CONNECTED",
            refused("cannot be decrypted"),
            vec![],
            |peer| {
                peer.send_raw(&[&[23, 3, 3, 0, 40][..], &[1; 40]].concat())?;
                self::hold(&peer.tcp)
            },
        ),
        answering(
            "CONNECTED twice",
            reset("CONNECTED out of turn"),
            connected(&connected(b"")),
            hold,
        ),
        answering(
            "DATA of 0 bytes",
            reset("length 0"),
            connected(&frame(DATA, b"")),
            hold,
        ),
        answering(
            "DATA after END",
            reset("a frame after END"),
            connected(&[&end[..], &frame(DATA, b"x")].concat()),
            hold,
        ),
        answering(
            "END after END",
            reset("a frame after END"),
            connected(&[&end[..], &end].concat()),
            hold,
        ),
        answering(
            "half an answer, then the end",
            reset("closed the tunnel in the middle"),
            connected(&frame(DATA, b"half an ans")),
            finish,
        ),
        answering(
            "half an answer, then close_notify",
            reset("closed the tunnel in the middle"),
            connected(&frame(DATA, b"half an ans")),
            close,
        ),
        answering(
            "half a frame, then the end",
            reset("closed the tunnel in the middle"),
            connected(&frame_of_length(DATA, 100, b"half an ans")),
            finish,
        ),
        answering(
            "a forged record",
            reset("cannot be decrypted"),
            connected(b""),
            |peer| {
                let mut record = peer.seal(&frame(DATA, b"forged"))?;
                record[10] ^= 0x80;
                peer.send_raw(&record)?;
                // Closing with bytes of the client unread would reset the connection, which the daemon may see first.
                self::hold(&peer.tcp)
            },
        ),
        answering(
            "RESET",
            reset("App the app says so"),
            connected(&frame(RESET, b"\x01the app says so")),
            hold,
        ),
    ];
    let mut faults = Faults::default();
    run(&mesh, &daemon, cases, &[], &mut faults)?;
    unharmed(&mesh, daemon, &before);
    faults.finish();
    Ok(())
}
