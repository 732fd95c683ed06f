//! `auth-daemon observe`: shows the connections that ended in the last minutes, and follows new ones.

mod merge;

use std::{
    io::{self, ErrorKind, IsTerminal, Write},
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anstyle::{AnsiColor, Style};
use auth_mesh::Identity;
use auth_support::config;

use self::merge::Merged;
use super::{
    daemons::{Daemons, Selection},
    pairs::plain,
};
use crate::observe::{
    access_log::Direction,
    flows::{Flow, Verdict, format_time},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Keep running, and show connections as they end.
    #[arg(long, short)]
    follow: bool,
    /// Only connections from this client: a namespace, a pod as NAMESPACE/NAME, a SPIFFE ID, or an IP address.
    #[arg(long)]
    from: Option<Party>,
    /// Only connections to this server: a namespace, a pod or Service as NAMESPACE/NAME, a SPIFFE ID, or an IP address.
    #[arg(long)]
    to: Option<Party>,
    /// Only connections that were established (`allowed`), or only those that were refused (`denied`).
    #[arg(long)]
    verdict: Option<Verdict>,
    /// Only connections in plaintext, including those that were refused for it.
    #[arg(long)]
    plaintext: bool,
    /// Only connections that were allowed, and that a dry-run policy would refuse.
    #[arg(long)]
    would_be_denied: bool,
    /// Only connections that ended in the last so many seconds, minutes or hours (30s, 5m, 1h).
    #[arg(long, value_parser = age)]
    since: Option<Duration>,
    /// The format. Without this option: text on a terminal, JSON elsewhere.
    #[arg(long, short)]
    output: Option<Format>,
    #[command(flatten)]
    daemons: Selection,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One line for each connection, for people.
    Text,
    /// One JSON object a line for each connection. Its fields are stable.
    Json,
}

/// One end of a connection, as a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Party {
    Address(IpAddr),
    Identity(String),
    /// A pod or a Service, as `namespace/name`.
    Object(String),
    Namespace(String),
}

pub(super) fn observe(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let stdout = io::stdout();
    let format = arguments.output.unwrap_or(if stdout.is_terminal() {
        Format::Text
    } else {
        Format::Json
    });
    let since = arguments
        .since
        .map(|age| format_time(SystemTime::now() - age));
    let selected = |flow: &Flow| {
        since.as_ref().is_none_or(|since| flow.time >= *since) && arguments.select(flow)
    };
    let daemons = Daemons::find(&arguments.daemons)?;
    let several = daemons.list().len() + daemons.missing().len() > 1;
    let mut merged = Merged::new(daemons);
    // Removes colours if standard output is not a terminal that shows them.
    let mut out = anstream::AutoStream::auto(stdout.lock());
    loop {
        let shown = merged.show(selected, |flow| {
            match format {
                Format::Text => writeln!(out, "{}", line(flow, several)),
                Format::Json => writeln!(out, "{}", serde_json::to_string(flow)?),
            }?;
            Ok(())
        });
        match shown {
            Err(error) if is_broken_pipe(&error) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error),
            Ok(_) if arguments.follow => merged.wait(),
            Ok(true) => return Ok(ExitCode::SUCCESS),
            Ok(false) => return Ok(ExitCode::FAILURE),
        }
    }
}

/// Whether the reader of standard output has ended: `observe | head`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

impl Arguments {
    fn select(&self, flow: &Flow) -> bool {
        let from = self.from.as_ref().is_none_or(|party| {
            let (pod, identity) = (&flow.client_pod, &flow.client_identity);
            party.is(&[Some(flow.client)], &[pod], identity)
        });
        let to = self.to.as_ref().is_none_or(|party| {
            let addresses = [flow.destination, flow.endpoint];
            party.is(
                &addresses,
                &[&flow.server_pod, &flow.service],
                &flow.server_identity,
            )
        });
        let verdict = self.verdict.is_none_or(|verdict| verdict == flow.verdict);
        let dry_run = !self.would_be_denied || flow.would_be_denied;
        from && to && verdict && dry_run && (!self.plaintext || flow.path == "plaintext")
    }
}

impl Party {
    fn is(
        &self,
        addresses: &[Option<SocketAddr>],
        objects: &[&Option<String>],
        identity: &Option<String>,
    ) -> bool {
        let mut objects = objects.iter().filter_map(|object| object.as_deref());
        match self {
            Self::Address(wanted) => addresses
                .iter()
                .flatten()
                .any(|address| address.ip() == *wanted),
            Self::Identity(wanted) => identity.as_ref() == Some(wanted),
            Self::Object(wanted) => objects.any(|object| object == wanted),
            Self::Namespace(wanted) => {
                let identity = identity.as_ref().and_then(|id| id.parse::<Identity>().ok());
                objects.any(|object| object.split('/').next() == Some(wanted))
                    || identity.is_some_and(|identity| identity.namespace() == wanted)
            }
        }
    }
}

impl std::str::FromStr for Party {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let owned = text.to_owned();
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if text.starts_with("spiffe://") {
            return Ok(Self::Identity(owned));
        }
        match text.split('/').collect::<Vec<_>>()[..] {
            [namespace] if !namespace.is_empty() => Ok(Self::Namespace(owned)),
            [namespace, name] if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::Object(owned))
            }
            _ => Err("is not a namespace, NAMESPACE/NAME, a SPIFFE ID or an IP address"),
        }
    }
}

fn age(text: &str) -> Result<Duration, String> {
    config::duration(text, Duration::from_secs(1), Duration::from_secs(24 * 3600))
}

/// Describes a connection in a line, with colours, and with its node if there are several.
fn line(flow: &Flow, several: bool) -> String {
    let clock = flow.time.get(11..23).unwrap_or(&flow.time);
    let client = party(&flow.client_pod, Some(flow.client));
    let server = party(
        flow.service
            .as_ref()
            .map_or(&flow.server_pod, |_| &flow.service),
        flow.destination,
    );
    let pod = match (&flow.service, &flow.server_pod) {
        (Some(_), Some(pod)) => format!(" ({pod})"),
        _ => String::new(),
    };
    let side = match flow.direction {
        Direction::Outbound => "out",
        Direction::Inbound => "in ",
    };
    let path = match flow.path.as_str() {
        "plaintext" => paint(AnsiColor::Yellow, "plaintext"),
        path => path.to_owned(),
    };
    let result = match flow.result.as_str() {
        "ok" => paint(AnsiColor::Green, "ok"),
        "refused" => paint(AnsiColor::Red, "refused"),
        other => paint(AnsiColor::Yellow, other),
    };
    let node = match several {
        true => format!("{} ", flow.node),
        false => String::new(),
    };
    let mut line = format!(
        "{clock} {node}{side} {client} -> {server}{pod}  {path}  {result}  {} ms  {} B up, {} B down",
        flow.duration_ms, flow.bytes_to_server, flow.bytes_to_client
    );
    if !flow.reason.is_empty() {
        line.push_str(&format!("  {}", plain(&flow.reason)));
    }
    if let Some(policy) = &flow.policy {
        line.push_str(&format!("  [{}]", plain(policy)));
    }
    line
}

/// The name, and the address if there is no name; always with the port of an address.
fn party(name: &Option<String>, address: Option<SocketAddr>) -> String {
    match (name, address) {
        (Some(name), Some(address)) => format!("{name}:{}", address.port()),
        (Some(name), None) => name.clone(),
        (None, Some(address)) => address.to_string(),
        (None, None) => "?".to_owned(),
    }
}

fn paint(colour: AnsiColor, text: &str) -> String {
    let style = Style::new().fg_color(Some(colour.into()));
    format!("{style}{text}{style:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> Flow {
        Flow {
            time: "2026-01-02T03:04:05.006Z".into(),
            node: "a".into(),
            direction: Direction::Outbound,
            verdict: Verdict::Allowed,
            path: "tunnel".into(),
            client: ([10, 0, 0, 1], 46478).into(),
            client_pod: Some("shop/cart-1".into()),
            client_workload: None,
            client_identity: Some("spiffe://cluster.local/ns/shop/sa/cart".into()),
            destination: Some(([10, 96, 0, 1], 80).into()),
            service: Some("bank/pay".into()),
            endpoint: Some(([10, 0, 1, 1], 8080).into()),
            server_pod: Some("bank/pay-7".into()),
            server_workload: None,
            server_identity: Some("spiffe://cluster.local/ns/bank/sa/pay".into()),
            bytes_to_server: 10,
            bytes_to_client: 20,
            duration_ms: 3,
            result: "ok".into(),
            reason: String::new(),
            policy: None,
            would_be_denied: false,
            client_person: None,
        }
    }

    fn select(options: &[&str], flow: &Flow) -> bool {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            arguments: Arguments,
        }
        let words = ["observe"].iter().chain(options);
        let command = <Command as clap::Parser>::try_parse_from(words).unwrap();
        command.arguments.select(flow)
    }

    #[test]
    fn selects_by_either_end() {
        for (options, expected) in [
            (&["--from", "shop"][..], true),
            (&["--from", "bank"], false),
            (&["--from", "shop/cart-1", "--to", "bank/pay"], true),
            (&["--to", "bank/pay-7"], true),
            (&["--to", "bank/pay-8"], false),
            (&["--to", "bank"], true),
            (&["--to", "ban"], false),
            (&["--from", "10.0.0.1"], true),
            (&["--to", "10.96.0.1"], true),
            (&["--to", "10.0.1.1"], true),
            (&["--to", "10.0.0.1"], false),
            (&["--from", "spiffe://cluster.local/ns/shop/sa/cart"], true),
            (&["--from", "spiffe://cluster.local/ns/shop/sa/car"], false),
            (&["--verdict", "allowed"], true),
            (&["--verdict", "denied"], false),
            (&["--plaintext"], false),
            (&["--would-be-denied"], false),
        ] {
            assert_eq!(select(options, &flow()), expected, "{options:?}");
        }
    }

    #[test]
    fn a_pod_whose_name_is_unknown_is_selected_by_its_identity() {
        let flow = Flow {
            client_pod: None,
            ..flow()
        };
        assert!(select(&["--from", "shop"], &flow));
        assert!(!select(&["--from", "shop/cart-1"], &flow));
    }

    #[test]
    fn refuses_filters_that_match_nothing() {
        for text in ["", "/", "a/", "/b", "a/b/c"] {
            assert!(text.parse::<Party>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_line_has_names_path_and_reason() {
        let text = anstream::adapter::strip_str(&line(&flow(), false)).to_string();
        assert_eq!(
            text,
            "03:04:05.006 out shop/cart-1:46478 -> bank/pay:80 (bank/pay-7)  tunnel  ok  3 ms  10 B up, 20 B down"
        );
        let refused = Flow {
            client_pod: None,
            service: None,
            verdict: Verdict::Denied,
            direction: Direction::Inbound,
            result: "refused".into(),
            reason: "no policy allows it".into(),
            policy: Some("bank/deny".into()),
            ..flow()
        };
        let text = anstream::adapter::strip_str(&line(&refused, true)).to_string();
        assert_eq!(
            text,
            "03:04:05.006 a in  10.0.0.1:46478 -> bank/pay-7:80  tunnel  refused  3 ms  10 B up, 20 B down  no policy allows it  \
             [bank/deny]"
        );
    }
}
