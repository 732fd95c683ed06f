//! `auth-daemon probe`: queries the health of the daemon in this container, and of no other daemon on the node. For the
//! kubelet's probes.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};

use crate::admin::{HEALTH_SOCKET, LIVE, READY};

/// Timeout for the answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum length of an answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 4 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The health check.
    what: What,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    /// Whether the daemon serves its node, or is a standby.
    Ready,
    /// Whether the daemon's threads make progress.
    Live,
}

pub(super) fn probe(arguments: &Arguments) -> anyhow::Result<()> {
    let what = match arguments.what {
        What::Ready => READY,
        What::Live => LIVE,
    };
    let path = Path::new(HEALTH_SOCKET);
    let (passes, answer) = ask(path, what).with_context(|| {
        format!("{HEALTH_SOCKET}: is there a daemon that was started with --stand-by?")
    })?;
    let answer = answer.trim_end();
    if !passes {
        bail!("{answer}");
    }
    println!("{answer}");
    Ok(())
}

/// Queries the daemon behind the socket at `path`. Returns whether the check passes, and the daemon's answer.
pub(crate) fn ask(path: &Path, what: &str) -> anyhow::Result<(bool, String)> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET {what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok((head.starts_with("HTTP/1.1 200 "), body.to_owned()))
}
