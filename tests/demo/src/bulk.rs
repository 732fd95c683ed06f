//! Streams at maximum speed.

use anyhow::{Context, Result, ensure};
use mesh_tests::Iperf3;

use super::evidence::Evidence;
use super::stage::{CLIENT, Stage};

pub(super) fn bulk_transfer(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let iperf3 = Iperf3::start(&web, IPERF3)?;
    for (direction, more) in [("client to server", None), ("server to client", Some("-R"))] {
        // The first bytes of each packet identify it.
        let capture = stage.mesh.wire().capture_start_of_packets(KEPT)?;
        let mut arguments = vec!["-t", "1", "-P", "2"];
        arguments.extend(more);
        let report = iperf3.measure(&client, web.ipv4().into(), &arguments)?;
        let recording = capture.stop()?;
        let received = &report["end"]["sum_received"];
        let bytes = received["bytes"]
            .as_u64()
            .context("iperf3 reports no bytes")?;
        let rate = received["bits_per_second"].as_f64().unwrap_or_default() / 1e9;
        evidence.saw(format!(
            "{direction}: {:.0} MB in 2 streams of iperf3 arrived, {rate:.1} Gbit/s with all of it on this machine",
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
    }
    Ok(())
}

/// iperf3's default port.
const IPERF3: u16 = 5201;
/// In bytes: a TLS record's header and a little more.
const KEPT: usize = 16;
