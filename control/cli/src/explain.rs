//! `gantry explain connect POD SERVICE:PORT`: would it connect, and if not, why.
//!
//! The nodes try packets on the programs that are attached, with the maps of this moment, and leave no
//! trace. Exit code 0: it would connect; 1: it would not.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use gantry_api::proto::{ExplainReply, ExplainRequest};
use serde_json::json;

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Subcommand, Debug)]
pub(crate) enum Explain {
    /// Whether a pod would connect to a Service, by which backend and policies, or why not
    Connect(Connect),
}

#[derive(Args, Debug)]
pub(crate) struct Connect {
    /// The client: name, or namespace/name
    pod: String,
    /// What it connects to: name, name.namespace or an address, and a port's number or name
    #[arg(value_name = "SERVICE:PORT")]
    to: String,
    /// By UDP
    #[arg(long)]
    udp: bool,
    /// json
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = ["", "json"])]
    output: String,
}

impl Explain {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let Self::Connect(connect) = self;
        let session = Session::open(global).await?;
        let request = connect.request(&session.namespace)?;
        let reply = session
            .stats
            .clone()
            .explain(session.request(request))
            .await;
        let reply = reply?.into_inner();
        match connect.output.as_str() {
            "json" => output::print(&format!("{:#}\n", object(&reply)))?,
            _ => output::print(&text(&reply))?,
        }
        Ok(match reply.connects {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

impl Connect {
    fn request(&self, namespace: &str) -> Result<ExplainRequest, Failure> {
        let (namespace, pod) = self.pod.split_once('/').unwrap_or((namespace, &self.pod));
        let pod = pod.strip_prefix("pod/").unwrap_or(pod);
        let found = self.to.rsplit_once(':');
        let found = found.filter(|(service, port)| !service.is_empty() && !port.is_empty());
        // An IPv6 address has colons of its own.
        let found = found.filter(|(service, _)| !service.contains(':') || service.ends_with(']'));
        let Some((service, port)) = found else {
            let text = format!(
                "{:?} names no service and port: web:80, web.shop:http, 10.96.0.1:80, [fd00::1]:80",
                self.to
            );
            return Err(Failure::Local(text));
        };
        Ok(ExplainRequest {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            service: service.to_owned(),
            port: port.to_owned(),
            udp: self.udp,
        })
    }
}

/// A line for each step, and the conclusion.
fn text(reply: &ExplainReply) -> String {
    let mut rows = Vec::new();
    for step in &reply.steps {
        let mark = if step.ok { "ok" } else { "NO" };
        let cells = [mark, &step.about, &step.node, &step.text];
        rows.push(cells.map(str::to_owned).to_vec());
    }
    format!("{}\n{}\n", output::table_text(&rows, &[]), reply.conclusion)
}

fn object(reply: &ExplainReply) -> serde_json::Value {
    let steps = reply.steps.iter().map(
        |step| json!({"about": step.about, "node": step.node, "ok": step.ok, "text": step.text}),
    );
    json!({
        "connects": reply.connects,
        "conclusion": reply.conclusion,
        "steps": steps.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use gantry_api::proto::ExplainStep;

    use super::*;

    fn connect(pod: &str, to: &str) -> Connect {
        Connect {
            pod: pod.into(),
            to: to.into(),
            udp: false,
            output: String::new(),
        }
    }

    #[test]
    fn pod_service_and_port_are_told_apart() {
        for (pod, to, expected) in [
            ("client", "web:80", Some(("here", "client", "web", "80"))),
            (
                "shop/client",
                "web.shop:http",
                Some(("shop", "client", "web.shop", "http")),
            ),
            (
                "client",
                "[fd00::1]:80",
                Some(("here", "client", "[fd00::1]", "80")),
            ),
            ("client", "fd00::1", None),
            ("client", "web", None),
            ("client", "web:", None),
        ] {
            let request = connect(pod, to).request("here");
            let found = request
                .as_ref()
                .ok()
                .map(|r| (&*r.namespace, &*r.pod, &*r.service, &*r.port));
            assert_eq!(found, expected, "{pod} {to}");
        }
    }

    #[test]
    fn a_story_is_lines_and_a_conclusion() {
        let step = |about: &str, ok| ExplainStep {
            about: about.into(),
            text: "why".into(),
            ok,
            node: "n1".into(),
        };
        let reply = ExplainReply {
            steps: vec![step("name", true), step("ingress", false)],
            connects: false,
            conclusion: "dropped at ingress".into(),
        };
        let expected = "ok   name      n1   why\nNO   ingress   n1   why\n\ndropped at ingress\n";
        assert_eq!(text(&reply), expected);
        assert_eq!(object(&reply)["steps"][1]["ok"], false);
    }
}
