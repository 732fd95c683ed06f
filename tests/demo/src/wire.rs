//! Traffic on the link between the nodes, without the daemon and with it.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{Recording, Stream, TlsRecord};

use super::evidence::Evidence;
use super::server_hello::{TLS_1_3, X25519_MLKEM768, server_hello};
use super::stage::{CLIENT, PORT, Stage};

pub(super) fn plaintext_before(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let capture = stage.mesh.wire().capture()?;
    let answer = stage.ask(web.at(PORT), &stage.path("before"))?;
    evidence.saw(format!(
        "curl http://{}{} got {:?}",
        web.at(PORT),
        stage.path("before"),
        answer.body
    ));
    let recording = capture.stop()?;
    let between = recording.tcp_between(client.ipv4().into(), web.ipv4().into());
    let streams = between.streams();
    let readable = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        text.lines()
            .find(|line| line.contains(&stage.marker))
            .map(str::to_owned)
    };
    let request = streams
        .iter()
        .find_map(|stream| readable(&stream.to_server));
    let reply = streams
        .iter()
        .find_map(|stream| readable(&stream.to_client));
    evidence.saw(format!(
        "on the wire, from client to server: {:?}",
        request.context("the request is not readable on the wire")?
    ));
    evidence.saw(format!(
        "on the wire, from server to client: {:?}",
        reply.context("the answer is not readable on the wire")?
    ));
    Ok(())
}

pub(super) fn mtls_on_wire(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let capture = stage.mesh.wire().capture()?;
    let answer = stage.ask(web.at(PORT), &stage.path("after"))?;
    evidence.saw(format!(
        "curl http://{}{} got {:?}",
        web.at(PORT),
        stage.path("after"),
        answer.body
    ));
    only_tls(
        &capture.stop()?,
        client.ipv4().into(),
        web.ipv4().into(),
        &stage.marker,
        evidence,
    )
}

/// Verifies that the traffic between two addresses is TLS 1.3 with a post-quantum key exchange, and that no packet at
/// all contains the marker. At least one connection must have started during the recording.
pub(super) fn only_tls(
    recording: &Recording,
    client: IpAddr,
    server: IpAddr,
    marker: &str,
    evidence: &Evidence,
) -> Result<()> {
    let streams = recording.tcp_between(client, server).streams();
    ensure!(!streams.is_empty(), "no connection crossed the wire");
    for stream in &streams {
        let (sent, received) = records(stream)?;
        let hello = server_hello(&stream.to_client)?;
        ensure!(
            hello.version == Some(TLS_1_3),
            "the server chose another version than TLS 1.3: {hello:x?}"
        );
        ensure!(
            hello.group == Some(X25519_MLKEM768),
            "the server chose another key exchange than X25519MLKEM768: {hello:x?}"
        );
        evidence.saw(format!(
            "{} -> {}: {sent} and {received} TLS records, all after the hellos encrypted, and no byte between them",
            stream.client, stream.server
        ));
        evidence.saw(format!(
            "its ServerHello: supported_versions 0x{TLS_1_3:04x} (TLS 1.3), key_share 0x{X25519_MLKEM768:04x} \
             (X25519MLKEM768), cipher suite 0x{:04x}",
            hello.suite
        ));
    }
    ensure!(
        !recording.contains(marker.as_bytes()),
        "{marker} is readable on the wire"
    );
    evidence.saw(format!(
        "{marker:?} is in none of the {} packets on the wire ({} bytes)",
        recording.packets().len(),
        recording.payload_bytes()
    ));
    Ok(())
}

/// Counts the TLS records that each side sent. First verifies that they are what TLS 1.3 shows to an observer: one
/// hello in the clear, possibly a change_cipher_spec without meaning, and encrypted records.
fn records(stream: &Stream) -> Result<(usize, usize)> {
    ensure!(!stream.gap, "the capture of {} has a gap", stream.client);
    let (sent, received) = stream
        .tls_records()
        .with_context(|| format!("between {} and {}", stream.client, stream.server))?;
    for records in [&sent, &received] {
        check_records(records)
            .with_context(|| format!("between {} and {}", stream.client, stream.server))?;
    }
    Ok((sent.len(), received.len()))
}

fn check_records(records: &[TlsRecord]) -> Result<()> {
    let [hello, rest @ ..] = records else {
        bail!("one side sent nothing");
    };
    ensure!(
        hello.content_type == HANDSHAKE,
        "the first record is of type {}",
        hello.content_type
    );
    ensure!(
        rest.iter().any(|record| record.is_application_data()),
        "nothing encrypted was sent"
    );
    for record in rest {
        let empty_change = record.content_type == CHANGE_CIPHER_SPEC && record.length == 1;
        ensure!(
            record.is_application_data() || empty_change,
            "after the hello, a record of type {} is not encrypted",
            record.content_type
        );
    }
    Ok(())
}

const CHANGE_CIPHER_SPEC: u8 = 20;
const HANDSHAKE: u8 = 22;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(content_type: u8, length: usize) -> TlsRecord {
        TlsRecord {
            content_type,
            length,
        }
    }

    #[test]
    fn only_hellos_may_be_readable() {
        assert!(check_records(&[record(22, 90), record(20, 1), record(23, 60)]).is_ok());
        for bad in [
            &[][..],
            &[record(22, 90)],
            &[record(23, 90)],
            &[record(22, 90), record(22, 600), record(23, 60)],
            &[record(22, 90), record(23, 60), record(21, 2)],
        ] {
            assert!(check_records(bad).is_err(), "{bad:?}");
        }
    }
}
