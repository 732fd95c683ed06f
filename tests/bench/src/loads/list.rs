//! The loads, in the order of the table.

use super::load::{Better, Group, Load, Row, When};
use super::{beside, iperf3, memory, pod_app, wrk};
use crate::system::Way;

const fn rate(key: &'static str, name: &'static str, unit: &'static str) -> Row {
    Row {
        key,
        name,
        unit,
        better: Better::More,
    }
}

const fn price(key: &'static str, name: &'static str, unit: &'static str) -> Row {
    Row {
        key,
        name,
        unit,
        better: Better::Less,
    }
}

pub(crate) static LOADS: [Load; 16] = [
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            rate("stream", "iperf3, 1 stream", GBIT),
            price("stream-cpu", "  proxies' CPU per GiB", SECONDS),
        ],
        run: |stage, way, time| iperf3::run(stage, way, time, 1),
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            rate("streams-8", "iperf3, 8 streams", GBIT),
            price("streams-8-cpu", "  proxies' CPU per GiB", SECONDS),
        ],
        run: |stage, way, time| iperf3::run(stage, way, time, 8),
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[rate(
            "keep-alive-32",
            "HTTP keep-alive, 32 connections",
            REQUESTS,
        )],
        run: |stage, way, time| wrk::rate(stage, way, time, 32),
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            price(
                "keep-alive-1-p50",
                "HTTP keep-alive, 1 connection, p50",
                MICROSECONDS,
            ),
            price("keep-alive-1-p99", "  p99", MICROSECONDS),
        ],
        run: wrk::latency,
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            rate(
                "connections-32",
                "a connection per request, 32 at a time",
                REQUESTS,
            ),
            price("connections-32-cpu", "  proxies' CPU per 1,000", SECONDS),
        ],
        run: |stage, way, time| wrk::each(stage, way, time, 32),
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            price(
                "set-up-p50",
                "connection set-up, one by one, p50",
                MICROSECONDS,
            ),
            price("set-up-cpu", "  proxies' CPU per 1,000", SECONDS),
        ],
        run: pod_app::set_up,
    },
    Load {
        group: Group::Across,
        way: Way::Across,
        when: When::EachRound,
        rows: &[
            rate(
                "beside-keep-alive-32",
                "HTTP keep-alive, 32 connections beside a stream",
                REQUESTS,
            ),
            rate("beside-share", "  of the rate alone", PERCENT),
            price("beside-p99", "  p99", MICROSECONDS),
            rate("beside-stream", "  the stream", GBIT),
        ],
        run: |stage, way, time| beside::run(stage, way, time, 32),
    },
    Load {
        group: Group::OneNode,
        way: Way::OneNode,
        when: When::EachRound,
        rows: &[
            rate("node-stream", "iperf3, 1 stream", GBIT),
            price("node-stream-cpu", "  proxies' CPU per GiB", SECONDS),
        ],
        run: |stage, way, time| iperf3::run(stage, way, time, 1),
    },
    Load {
        group: Group::OneNode,
        way: Way::OneNode,
        when: When::EachRound,
        rows: &[rate(
            "node-keep-alive-32",
            "HTTP keep-alive, 32 connections",
            REQUESTS,
        )],
        run: |stage, way, time| wrk::rate(stage, way, time, 32),
    },
    Load {
        group: Group::OneNode,
        way: Way::OneNode,
        when: When::EachRound,
        rows: &[
            price(
                "node-keep-alive-1-p50",
                "HTTP keep-alive, 1 connection, p50",
                MICROSECONDS,
            ),
            price("node-keep-alive-1-p99", "  p99", MICROSECONDS),
        ],
        run: wrk::latency,
    },
    Load {
        group: Group::OneNode,
        way: Way::OneNode,
        when: When::EachRound,
        rows: &[
            rate(
                "node-connections-32",
                "a connection per request, 32 at a time",
                REQUESTS,
            ),
            price(
                "node-connections-32-cpu",
                "  proxies' CPU per 1,000",
                SECONDS,
            ),
        ],
        run: |stage, way, time| wrk::each(stage, way, time, 32),
    },
    Load {
        group: Group::Outside,
        way: Way::Outside,
        when: When::EachRound,
        rows: &[
            rate("outside-stream", "iperf3, 1 stream", GBIT),
            price("outside-stream-cpu", "  proxies' CPU per GiB", SECONDS),
        ],
        run: |stage, way, time| iperf3::run(stage, way, time, 1),
    },
    Load {
        group: Group::Outside,
        way: Way::Outside,
        when: When::EachRound,
        rows: &[
            price(
                "outside-keep-alive-1-p50",
                "HTTP keep-alive, 1 connection, p50",
                MICROSECONDS,
            ),
            price("outside-keep-alive-1-p99", "  p99", MICROSECONDS),
        ],
        run: wrk::latency,
    },
    Load {
        group: Group::Outside,
        way: Way::Outside,
        when: When::EachRound,
        rows: &[rate(
            "outside-keep-alive-32",
            "HTTP keep-alive, 32 connections",
            REQUESTS,
        )],
        run: |stage, way, time| wrk::rate(stage, way, time, 32),
    },
    Load {
        group: Group::Cost,
        way: Way::Across,
        when: When::OnFreshProxies,
        rows: &[
            price(
                "idle-client",
                "one of 1,000 idle connections, client's proxy",
                KIB,
            ),
            price(
                "idle-server",
                "one of 1,000 idle connections, server's proxy",
                KIB,
            ),
        ],
        run: |stage, way, _| pod_app::idle(stage, way),
    },
    Load {
        group: Group::Cost,
        way: Way::Across,
        when: When::AtTheEnd,
        rows: &[
            price(
                "memory-client",
                "memory after all loads, client's proxy",
                MIB,
            ),
            price("memory-client-peak", "  at most", MIB),
            price(
                "memory-server",
                "memory after all loads, server's proxy",
                MIB,
            ),
            price("memory-server-peak", "  at most", MIB),
        ],
        run: |stage, way, _| memory::run(stage, way),
    },
];

const GBIT: &str = "Gbit/s";
const REQUESTS: &str = "/s";
const MICROSECONDS: &str = "µs";
const SECONDS: &str = "s";
const PERCENT: &str = "%";
const KIB: &str = "KiB";
const MIB: &str = "MiB";
