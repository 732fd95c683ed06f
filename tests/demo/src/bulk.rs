//! Streams at maximum speed.

use anyhow::{Context, Result, ensure};
use mesh_tests::{Daemon, Iperf3};

use super::evidence::Evidence;
use super::stage::{CLIENT, NODE_A, NODE_B, Stage, soon};

pub(super) fn bulk_transfer(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let iperf3 = Iperf3::start(&web, IPERF3)?;
    let to = web.at(IPERF3).to_string();
    let daemons = [stage.daemon(NODE_A)?, stage.daemon(NODE_B)?];
    for (direction, more) in [("client to server", None), ("server to client", Some("-R"))] {
        let starts = daemons.map(Daemon::log_position);
        // The first bytes of each packet identify it.
        let capture = stage.mesh.wire().capture_start_of_packets(KEPT)?;
        let streams = STREAMS.to_string();
        let mut arguments = vec!["-t", "1", "-P", &streams];
        arguments.extend(more);
        let report = iperf3.measure(&client, web.ipv4().into(), &arguments)?;
        let recording = capture.stop()?;
        let received = &report["end"]["sum_received"];
        let bytes = received["bytes"]
            .as_u64()
            .context("iperf3 reports no bytes")?;
        let rate = received["bits_per_second"].as_f64().unwrap_or_default() / 1e9;
        evidence.saw(format!(
            "{direction}: {:.0} MB in {STREAMS} streams of iperf3 arrived, {rate:.1} Gbit/s with all of it on this machine",
            bytes as f64 / 1e6
        ));
        let streams: Vec<_> = recording
            .tcp_between(client.ipv4().into(), web.ipv4().into())
            .streams()
            .into_iter()
            // The tunnel to another port may end meanwhile. Without its opening, either side may count as the client.
            .filter(|stream| [stream.client, stream.server].contains(&web.at(IPERF3)))
            .collect();
        let carried = recording.payload_bytes() as u64;
        for stream in &streams {
            ensure!(
                stream.tls_records().is_ok(),
                "{} -> {} is not the tunnel: {:?} {:?}{}",
                stream.client,
                stream.server,
                stream.to_server,
                stream.to_client,
                if stream.reset { ", a RST" } else { "" }
            );
        }
        evidence.saw(format!(
            "{carried} bytes crossed the wire in {} connections, each in TLS records",
            streams.len()
        ));
        ensure!(bytes > 0, "nothing arrived");
        ensure!(
            carried >= bytes,
            "less crossed the wire than iperf3 received: it went another way"
        );
        // The next recording must not begin within a record: iperf3 ends before its last bytes have crossed the wire.
        for (daemon, start) in daemons.into_iter().zip(starts) {
            soon("the ends of iperf3's connections", || {
                let lines = daemon.access_log_after(start);
                let ended = lines.iter().filter(|line| line["destination"] == to);
                (ended.count() > STREAMS).then_some(())
            })?;
        }
    }
    Ok(())
}

/// Number of connections with data, besides the one that controls them.
const STREAMS: usize = 2;
/// iperf3's default port.
const IPERF3: u16 = 5201;
/// In bytes: a TLS record's header and a little more.
const KEPT: usize = 16;
