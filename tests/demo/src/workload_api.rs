//! An app gets a certificate of its own by the SPIFFE Workload API.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{Place, Process, TIMEOUT, eventually_ok};
use prost::Message;

use super::evidence::Evidence;
use super::stage::{CLIENT, NEIGHBOUR, Stage};

const URL: &str = "http://127.0.0.1:15082/SpiffeWorkloadAPI/FetchX509SVID";
const ANSWER: &str = "workload-api.answer";
/// A gRPC message without content: not compressed, of no bytes.
const EMPTY: &str = "workload-api.request";
const FRAME: usize = 5;

/// X509SVIDResponse, with the fields that are shown.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<Svid>,
}

/// X509SVID.
#[derive(Clone, PartialEq, Message)]
struct Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    certificates: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
}

pub(super) fn workload_api(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, neighbour) = (stage.mesh.pod(CLIENT), stage.mesh.pod(NEIGHBOUR));
    let svid = fetch(&client)?;
    let fetched = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    evidence.saw(format!("curl {URL} in {CLIENT}: {}", svid.spiffe_id));
    let expected = "spiffe://cluster.local/ns/default/sa/client";
    ensure!(svid.spiffe_id == expected, "not {expected}");

    let file = |name: &str, content: &[u8]| {
        let path = client.folder().join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok::<_, anyhow::Error>(path.to_string_lossy().into_owned())
    };
    let certificate = file("app.der", &svid.certificates)?;
    let key = file("app-key.der", &svid.key)?;
    let openssl = |arguments: &[&str]| Ok(client.run("openssl", arguments)?.ok()?.stdout);
    let x509 = ["x509", "-inform", "DER", "-in", &certificate, "-noout"];
    let of_certificate: Result<String> = openssl(&[&x509[..], &["-pubkey"]].concat());
    let of_key = openssl(&["pkey", "-inform", "DER", "-in", &key, "-pubout"])?;
    ensure!(
        of_certificate? == of_key,
        "the key is another certificate's"
    );
    let roots = stage.ca()?.roots();
    let roots = roots.to_str().context("the roots' path")?;
    // At the time of the answer: it expires within seconds.
    let at = fetched.to_string();
    let verified = openssl(&["verify", "-attime", &at, "-CAfile", roots, &certificate])?;
    evidence.saw(format!("openssl verify: {}", verified.trim()));
    let serial = openssl(&[&x509[..], &["-serial"]].concat())?;
    let serial = serial.trim().trim_start_matches("serial=").to_lowercase();
    let tunnels = stage.daemon(client.node())?.status()?.certificates;
    ensure!(
        tunnels
            .iter()
            .all(|held| held.serial.trim_start_matches('0') != serial),
        "the key is a tunnel's"
    );

    let refused = neighbour.run("curl", ["-sS", URL])?;
    evidence.saw(format!(
        "in {NEIGHBOUR}, of another account: {}",
        refused.stderr.trim()
    ));
    ensure!(refused.code() == Some(REFUSED), "{refused:?}");
    Ok(())
}

/// Asks for the certificate as SPIFFE's clients do. The answer is a stream that does not end.
fn fetch(pod: &Place) -> Result<Svid> {
    let (request, answer) = (pod.folder().join(EMPTY), pod.folder().join(ANSWER));
    fs::write(&request, [0; FRAME])?;
    let mut command = pod.command("curl")?;
    command
        .args(["-sSN", "--http2-prior-knowledge", "--noproxy", "*"])
        .args(["-H", "content-type: application/grpc", "-H", "te: trailers"])
        .args(["-H", "workload.spiffe.io: true", "--data-binary"])
        .arg(format!("@{}", request.display()))
        .arg("-o")
        .arg(&answer)
        .arg(URL);
    let mut curl = Process::spawn(command)?;
    eventually_ok(TIMEOUT, "a certificate", || {
        if let Some(status) = curl.ended()? {
            bail!("curl has ended ({status}): {}", curl.stderr());
        }
        first(&answer)
    })
}

/// The certificate in the first message of the stream in `file`.
fn first(file: &Path) -> Result<Svid> {
    let stream = fs::read(file).context("no answer yet")?;
    let (frame, rest) = stream.split_at_checked(FRAME).context("no frame yet")?;
    let length = u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]);
    let message = rest.get(..length as usize).context("half a message")?;
    let mut svids = Answer::decode(message)?.svids;
    svids.pop().context("no certificate in the answer")
}

/// curl's exit code for a refused connection.
const REFUSED: i32 = 7;
