//! An event in words, and whether somebody wants it. Pure.

use ebpf_maps::drop::{DROP_NAMES, NO_BACKEND, POLICY};
use ebpf_maps::event::{
    AT_INGRESS, FlowEvent, IS_TRANSLATED, NOT_DROPPED, POINT_CONNECT, POINT_FROM_OUTSIDE,
    POINT_FROM_POD, POINT_SEND, POINT_TO_OUTSIDE, POINT_TO_POD,
};
use gantry_api::proto;
use jiff::Timestamp;

use super::names::Names;
use crate::dataplane::monotonic_ns;

/// Two clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Microseconds since 1970.
    pub wall_us: i64,
    /// The monotonic clock.
    pub monotonic_ns: u64,
}

impl Clock {
    /// This moment's.
    pub fn now() -> Self {
        Self {
            wall_us: Timestamp::now().as_microsecond(),
            monotonic_ns: monotonic_ns(),
        }
    }

    fn wall_us(&self, monotonic_ns: u64) -> i64 {
        let us = |ns: u64| i64::try_from(ns / 1_000).unwrap_or(i64::MAX);
        let offset = us(monotonic_ns).saturating_sub(us(self.monotonic_ns));
        self.wall_us.saturating_add(offset)
    }
}

/// What a watcher wants to see.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    namespace: String,
    pod: String,
    verdicts: Vec<String>,
}

impl Filter {
    /// What this request asks for.
    pub fn of(request: &proto::FlowsRequest) -> Self {
        Self {
            namespace: request.namespace.clone(),
            pod: request.pod.clone(),
            verdicts: request.verdicts.clone(),
        }
    }

    /// Whether one of the ends, or the Service between them, is meant, and the verdict is.
    pub fn wants(&self, flow: &proto::Flow) -> bool {
        if !self.verdicts.is_empty() && !self.verdicts.contains(&flow.verdict) {
            return false;
        }
        let ends = [&flow.source, &flow.destination, &flow.frontend];
        ends.into_iter().flatten().any(|end| {
            let in_namespace = self.namespace.is_empty() || end.namespace == self.namespace;
            let is_pod = self.pod.is_empty() || end.kind == "pod" && end.name == self.pod;
            in_namespace && is_pod
        })
    }
}

/// An event as it is told to people.
pub fn show(event: &FlowEvent, names: &Names, clock: &Clock) -> proto::Flow {
    let is_translated = event.flags & IS_TRANSLATED != 0;
    let frontend =
        is_translated.then(|| names.frontend(&event.frontend, event.frontend_port_be, event.proto));
    let is_refused_at_socket = event.reason == NO_BACKEND as u8 && event.point <= POINT_SEND;
    let destination = match is_refused_at_socket {
        true => None,
        false => Some(names.destination(event)),
    };
    // Packets to a Service without backends are not translated, and addressed to it.
    proto::Flow {
        time_us: clock.wall_us(event.time_ns),
        source: Some(names.source(event)),
        destination,
        frontend,
        protocol: event.proto.into(),
        verdict: verdict(event).to_owned(),
        reason: reason(event),
        point: point(event).to_owned(),
    }
}

fn verdict(event: &FlowEvent) -> &'static str {
    match event.reason {
        NOT_DROPPED if event.point <= POINT_SEND => "translated",
        NOT_DROPPED => "forwarded",
        reason if u32::from(reason) == NO_BACKEND => "refused",
        _ => "dropped",
    }
}

fn reason(event: &FlowEvent) -> String {
    if event.reason == NOT_DROPPED {
        return String::new();
    }
    if u32::from(event.reason) == POLICY {
        let at_ingress = event.flags & AT_INGRESS != 0;
        return if at_ingress {
            "policy (ingress)"
        } else {
            "policy (egress)"
        }
        .to_owned();
    }
    match DROP_NAMES.get(usize::from(event.reason)) {
        Some(name) => (*name).to_owned(),
        None => format!("reason {}", event.reason),
    }
}

fn point(event: &FlowEvent) -> &'static str {
    match event.point {
        POINT_CONNECT => "connect",
        POINT_SEND => "sendmsg",
        POINT_FROM_POD => "from-pod",
        POINT_TO_POD => "to-pod",
        POINT_FROM_OUTSIDE => "from-outside",
        POINT_TO_OUTSIDE => "to-outside",
        _ => "?",
    }
}
