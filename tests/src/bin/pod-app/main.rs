//! Acts as the clients and servers of the scenarios, inside pods.
//!
//! Each subcommand is one behaviour. Each event is one JSON object on one line of standard output, with its kind in
//! `event`. Servers print `listening` first, then `accepted` and `closed` forevery connection (with `errno` if it
//! failed), and run until they are killed. A client that fails prints `failed`, with `stage` and `errno`, and exits
//! with 1.

mod bidi;
mod chat;
mod churn;
mod connect;
mod dial;
mod echo;
mod flood;
mod given;
mod greeter;
mod half_close;
mod half_open;
mod idle_server;
mod many;
mod markers;
mod namespaces;
mod paced;
mod pattern;
mod peer;
mod report;
mod reset;
mod script;
mod server;
mod set_up;
mod steal;
mod steps;
mod transfer;
mod udp;
mod wait;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::report::Outcome;

#[derive(Parser)]
#[command(about = "Clients and servers for the scenarios of the mesh")]
struct Arguments {
    #[command(subcommand)]
    behaviour: Behaviour,
}

#[derive(Subcommand)]
enum Behaviour {
    EchoServer(echo::EchoServer),
    Greeter(greeter::Greeter),
    Sink(transfer::Sink),
    Stall(transfer::Stall),
    Source(transfer::Source),
    Bidi(bidi::Bidi),
    HalfClose(half_close::HalfClose),
    HalfOpen(half_open::HalfOpen),
    IdleServer(idle_server::IdleServer),
    Reset(reset::Reset),
    Script(script::Script),
    Steps(steps::Steps),
    Connect(connect::Connect),
    Dial(dial::Dial),
    GiveSocket(given::GiveSocket),
    Chat(chat::Chat),
    Many(many::Many),
    MarkerServer(markers::MarkerServer),
    MarkerCalls(markers::MarkerCalls),
    Churn(churn::Churn),
    Paced(paced::Paced),
    Flood(flood::Flood),
    Hoard(flood::Hoard),
    Namespaces(namespaces::Namespaces),
    SetUp(set_up::SetUp),
    Steal(steal::Steal),
    UdpEcho(udp::UdpEcho),
    UdpSend(udp::UdpSend),
}

fn main() -> ExitCode {
    raise_descriptor_limit();
    let outcome: Outcome = match Arguments::parse().behaviour {
        Behaviour::EchoServer(it) => it.run(),
        Behaviour::Greeter(it) => it.run(),
        Behaviour::Sink(it) => it.run(),
        Behaviour::Stall(it) => it.run(),
        Behaviour::Source(it) => it.run(),
        Behaviour::Bidi(it) => it.run(),
        Behaviour::HalfClose(it) => it.run(),
        Behaviour::HalfOpen(it) => it.run(),
        Behaviour::IdleServer(it) => it.run(),
        Behaviour::Reset(it) => it.run(),
        Behaviour::Script(it) => it.run(),
        Behaviour::Steps(it) => it.run(),
        Behaviour::Connect(it) => it.run(),
        Behaviour::Dial(it) => it.run(),
        Behaviour::GiveSocket(it) => it.run(),
        Behaviour::Chat(it) => it.run(),
        Behaviour::Many(it) => it.run(),
        Behaviour::MarkerServer(it) => it.run(),
        Behaviour::MarkerCalls(it) => it.run(),
        Behaviour::Churn(it) => it.run(),
        Behaviour::Paced(it) => it.run(),
        Behaviour::Flood(it) => it.run(),
        Behaviour::Hoard(it) => it.run(),
        Behaviour::Namespaces(it) => it.run(),
        Behaviour::SetUp(it) => it.run(),
        Behaviour::Steal(it) => it.run(),
        Behaviour::UdpEcho(it) => it.run(),
        Behaviour::UdpSend(it) => it.run(),
    };
    match outcome {
        Ok(fields) => {
            report::event("finished", fields);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            report::event("failed", failure.fields());
            ExitCode::FAILURE
        }
    }
}

/// Raises the descriptor limit as far as the hard limit allows, for thousands of connections. Beyond that, opening a
/// connection fails later with a visible error.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
