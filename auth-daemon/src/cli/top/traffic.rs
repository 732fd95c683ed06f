//! What daemons count, as rows of pairs of workloads with what changed since the daemons were asked before. No I/O.

use std::{collections::HashMap, time::Duration};

use super::super::pairs::{name, plain};
use crate::observe::{
    access_log::Direction,
    connect_times::ConnectTimes,
    flows::Verdict,
    pairs::{Answer, Pair},
};

/// The traffic of the daemons that were asked last.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// The last answer of each node.
    nodes: HashMap<String, Sample>,
    /// The rows, in no order.
    pub(super) rows: Vec<Row>,
}

/// A pair of workloads.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) key: Key,
    /// Connections that are open now.
    pub(super) open: u64,
    /// Connections that were opened, per second. Refused ones do not count.
    pub(super) new: f64,
    /// Bytes from client to server, per second.
    pub(super) up: f64,
    /// Bytes from server to client, per second.
    pub(super) down: f64,
    /// How long connections took until they were established, since the first answer. Without any since then, since the
    /// daemon started.
    pub(super) connect_times: ConnectTimes,
    /// Connections that were refused since the daemon started.
    pub(super) refused: u64,
    /// Whether some were refused since the answer before.
    pub(super) is_refusing: bool,
    pub(super) details: Details,
}

/// What distinguishes rows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) client: String,
    pub(super) server: String,
    pub(super) port: u16,
    /// How connections are protected.
    pub(super) protection: &'static str,
}

/// What a row has no column for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Details {
    pub(super) client_identity: Option<String>,
    pub(super) server_identity: Option<String>,
    /// The TLS key exchange.
    pub(super) key_exchange: Option<String>,
    pub(super) service: Option<String>,
    /// Why the last one was refused or reset, and the policies behind it.
    pub(super) reason: String,
    pub(super) policy: Option<String>,
    /// When the last one ended, or was last seen open.
    pub(super) last: String,
}

#[derive(Debug)]
struct Sample {
    at: Duration,
    totals: HashMap<(Key, Direction), Totals>,
    /// Connect times in the first answer.
    first: HashMap<(Key, Direction), ConnectTimes>,
}

#[derive(Clone, Debug, Default)]
struct Totals {
    open: u64,
    established: u64,
    to_server: u64,
    to_client: u64,
    connect_times: ConnectTimes,
    refused: u64,
    details: Details,
}

impl Traffic {
    /// Takes the answers of all daemons that answer, `at` a time since a moment that stays the same.
    pub(super) fn update(&mut self, at: Duration, answers: Vec<Answer>) {
        let mut sides: HashMap<(Key, Direction), Row> = HashMap::new();
        for Answer { node, pairs, .. } in answers {
            let mut totals: HashMap<_, Totals> = HashMap::new();
            for pair in pairs {
                totals
                    .entry((Key::of(&pair), pair.direction))
                    .or_default()
                    .add(pair);
            }
            let before = self.nodes.get(&node);
            for (key, now) in &totals {
                let side = now.since(key, before, at);
                match sides.get_mut(key) {
                    Some(row) => row.add(side),
                    None => {
                        sides.insert(key.clone(), side);
                    }
                }
            }
            let first = match self.nodes.remove(&node) {
                Some(sample) => sample.first,
                None => {
                    let times = |totals: &Totals| totals.connect_times.clone();
                    let all = totals.iter();
                    all.map(|(key, totals)| (key.clone(), times(totals)))
                        .collect()
                }
            };
            self.nodes.insert(node, Sample { at, totals, first });
        }
        // Where both ends' nodes were asked, the client's node knows more: it has also waited for the network.
        let outbound: Vec<_> = sides
            .keys()
            .filter(|(_, direction)| *direction == Direction::Outbound)
            .map(|(key, _)| (key.clone(), Direction::Inbound))
            .collect();
        for other_side in outbound {
            sides.remove(&other_side);
        }
        self.rows = sides.into_values().collect();
    }
}

impl Key {
    fn of(pair: &Pair) -> Self {
        Self {
            client: name(&pair.client),
            server: name(&pair.server),
            port: pair.port,
            protection: match pair.path.as_str() {
                "tunnel" => "TLS 1.3",
                "hbone" => "TLS 1.3 (HBONE)",
                "same-node" => "same node",
                "self" => "itself",
                _ => "plaintext",
            },
        }
    }
}

impl Totals {
    fn add(&mut self, pair: Pair) {
        let counts = pair.counts;
        match pair.verdict {
            Verdict::Denied => self.refused += counts.connections,
            Verdict::Allowed => self.established += counts.opened,
        }
        self.open += pair.open;
        self.to_server += counts.bytes_to_server;
        self.to_client += counts.bytes_to_client;
        self.connect_times.add(&counts.connect_times);
        let details = Details {
            client_identity: pair.client.identity,
            server_identity: pair.server.identity,
            key_exchange: counts.key_exchange,
            service: counts.service,
            reason: plain(&counts.reason),
            policy: counts.policy.as_deref().map(plain),
            last: pair.last,
        };
        self.details.add(details);
    }

    /// The row of these totals, with what was added since the answer before. A daemon that has restarted began at zero.
    fn since(&self, key: &(Key, Direction), before: Option<&Sample>, at: Duration) -> Row {
        let zero = Self::default();
        let seconds = before.map_or(0.0, |sample| at.saturating_sub(sample.at).as_secs_f64());
        let earlier = before.and_then(|sample| sample.totals.get(key));
        let earlier = earlier.unwrap_or(&zero);
        let added = |total: fn(&Self) -> u64| {
            let (now, earlier) = (total(self), total(earlier));
            now.checked_sub(earlier).unwrap_or(now)
        };
        let rate = |total| match seconds > 0.0 {
            true => added(total) as f64 / seconds,
            false => 0.0,
        };
        let first = before.and_then(|sample| sample.first.get(key));
        let recent = match first {
            Some(first) => self.connect_times.since(first),
            None => self.connect_times.clone(),
        };
        Row {
            key: key.0.clone(),
            open: self.open,
            new: rate(|totals| totals.established),
            up: rate(|totals| totals.to_server),
            down: rate(|totals| totals.to_client),
            connect_times: match recent.percentile(50) {
                Some(_) => recent,
                None => self.connect_times.clone(),
            },
            refused: self.refused,
            is_refusing: before.is_some() && added(|totals| totals.refused) > 0,
            details: self.details.clone(),
        }
    }
}

impl Row {
    /// Adds what another node counted of the same pair: a workload's pods may be on several nodes.
    fn add(&mut self, other: Self) {
        self.open += other.open;
        self.new += other.new;
        self.up += other.up;
        self.down += other.down;
        self.connect_times.add(&other.connect_times);
        self.refused += other.refused;
        self.is_refusing |= other.is_refusing;
        self.details.add(other.details);
    }
}

impl Details {
    /// Adds those of other connections. The later ones' count.
    fn add(&mut self, other: Self) {
        let (earlier, later) = match self.last <= other.last {
            true => (std::mem::take(self), other),
            false => (other, std::mem::take(self)),
        };
        *self = Self {
            client_identity: later.client_identity.or(earlier.client_identity),
            server_identity: later.server_identity.or(earlier.server_identity),
            key_exchange: later.key_exchange.or(earlier.key_exchange),
            service: later.service.or(earlier.service),
            reason: match later.reason.is_empty() {
                true => earlier.reason,
                false => later.reason,
            },
            policy: later.policy.or(earlier.policy),
            last: later.last,
        };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::observe::pairs::{Counts, Party};

    fn party(workload: &str) -> Party {
        Party {
            namespace: Some("shop".into()),
            workload: Some(workload.into()),
            identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{workload}")),
            ..Party::default()
        }
    }

    /// A pair of which `opened` connections were opened, one is open, and each has carried ten bytes up and twenty down.
    pub(crate) fn pair(client: &str, server: &str, opened: u64) -> Pair {
        let mut connect_times = ConnectTimes::default();
        for _ in 0..opened {
            connect_times.count(Duration::from_millis(2));
        }
        Pair {
            direction: Direction::Outbound,
            client: party(client),
            server: party(server),
            port: 8080,
            path: "tunnel".into(),
            verdict: Verdict::Allowed,
            counts: Counts {
                connections: opened.saturating_sub(1),
                opened,
                bytes_to_server: 10 * opened,
                bytes_to_client: 20 * opened,
                connect_times,
                ..Counts::default()
            },
            open: 1,
            first: "2026-01-01T00:00:00.000Z".into(),
            last: "2026-01-02T00:00:00.000Z".into(),
        }
    }

    pub(crate) fn refused(client: &str, server: &str, count: u64) -> Pair {
        Pair {
            verdict: Verdict::Denied,
            open: 0,
            counts: Counts {
                connections: count,
                opened: count,
                reason: "denied\u{1b}[31m by AuthorizationPolicy shop/p".into(),
                ..Counts::default()
            },
            last: "2026-01-03T00:00:00.000Z".into(),
            ..pair(client, server, 0)
        }
    }

    pub(crate) fn answer(node: &str, pairs: Vec<Pair>) -> Answer {
        Answer {
            node: node.into(),
            since: String::new(),
            seconds: 0,
            uncounted: 0,
            dropped: 0,
            unseen: Vec::new(),
            pairs,
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn only(traffic: &Traffic) -> &Row {
        let [row] = &traffic.rows[..] else {
            panic!("{traffic:?}")
        };
        row
    }

    #[test]
    fn rates_are_between_two_answers() {
        let mut traffic = Traffic::default();
        traffic.update(at(0), vec![answer("a", vec![pair("cart", "pay", 100)])]);
        let row = only(&traffic);
        assert_eq!((row.open, row.new, row.up), (1, 0.0, 0.0));
        traffic.update(at(2), vec![answer("a", vec![pair("cart", "pay", 110)])]);
        let row = only(&traffic);
        assert_eq!((row.new, row.up, row.down), (5.0, 50.0, 100.0));
        let key = &row.key;
        assert_eq!(
            (&*key.client, &*key.server, key.port, key.protection),
            ("shop/cart", "shop/pay", 8080, "TLS 1.3")
        );
        let median = row.connect_times.percentile(50).unwrap().as_micros();
        assert!((2000..2250).contains(&median), "{median}");
    }

    #[test]
    fn a_restarted_daemon_counts_from_zero_and_a_new_pair_is_new() {
        let mut traffic = Traffic::default();
        traffic.update(at(0), vec![answer("a", vec![pair("cart", "pay", 100)])]);
        traffic.update(at(1), vec![answer("a", vec![pair("cart", "pay", 7)])]);
        assert_eq!(only(&traffic).new, 7.0);
        let both = vec![pair("cart", "pay", 7), pair("cart", "stock", 3)];
        traffic.update(at(2), vec![answer("a", both)]);
        let new = |server: &str| {
            let mut rows = traffic.rows.iter();
            rows.find(|row| row.key.server == server).unwrap().new
        };
        assert_eq!((new("shop/pay"), new("shop/stock")), (0.0, 3.0));
    }

    #[test]
    fn both_ends_nodes_are_one_row_and_nodes_of_one_end_add_up() {
        let inbound = |opened| Pair {
            direction: Direction::Inbound,
            ..pair("cart", "pay", opened)
        };
        let mut traffic = Traffic::default();
        for (second, opened) in [(0, 10), (1, 20)] {
            let answers = vec![
                answer("a", vec![pair("cart", "pay", opened)]),
                answer("b", vec![pair("cart", "pay", opened), inbound(2 * opened)]),
            ];
            traffic.update(at(second), answers);
        }
        assert_eq!((only(&traffic).new, only(&traffic).open), (20.0, 2));
        // The server's node alone.
        traffic.update(at(2), vec![answer("b", vec![inbound(50)])]);
        assert_eq!(only(&traffic).new, 10.0);
    }

    #[test]
    fn refusals_do_not_count_as_new() {
        let mut traffic = Traffic::default();
        for (second, count) in [(0, 3), (1, 5)] {
            let pairs = vec![refused("cart", "pay", count), pair("cart", "pay", 9)];
            traffic.update(at(second), vec![answer("a", pairs)]);
        }
        let row = only(&traffic);
        assert_eq!((row.refused, row.is_refusing, row.new), (5, true, 0.0));
        let expected = "denied [31m by AuthorizationPolicy shop/p";
        assert_eq!(row.details.reason, expected, "no commands to the terminal");
        traffic.update(at(2), vec![answer("a", vec![refused("cart", "pay", 5)])]);
        assert!(!only(&traffic).is_refusing);
    }
}
