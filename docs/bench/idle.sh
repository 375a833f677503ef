#!/usr/bin/env bash
# What a node costs on which nothing happens: processor time of an agent with pods and no traffic, of `cirri lb`
# with health checks, and of their starts; and after how long `observe` shows what comes after a silence.
#
#     docs/bench/idle.sh [BINARY] [SECONDS]      (root; defaults: target/release/cirri, 60)
#
# Prints per cent of one processor (user and system time of the process, /proc/PID/task/*/schedstat; work that the
# kernel does for it in interrupts is not in it) and milliseconds for the starts. Marks: 0.2 % and 0.3 %.
# Everything is in network namespaces of its own and goes with the script.
set -euo pipefail
cirri=$(realpath "${1:-target/release/cirri}")
seconds=${2:-60}
lab=idle$$
place=cirri-idle-$$
servers=cirri-idle-servers-$$
work=$(mktemp -d)

finish() {
    local pids
    pids=$(jobs -p)
    # shellcheck disable=SC2086 # each is a word
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
    # shellcheck disable=SC2086 # each is a word
    [ -z "$pids" ] || wait $pids 2>/dev/null || true
    [ ! -e "$work/lb.yaml" ] || nsenter --net=/run/netns/"$place" "$cirri" lb down --config "$work/lb.yaml" || true
    ip netns delete "$place" 2>/dev/null || true
    ip netns delete "$servers" 2>/dev/null || true
    "$cirri" lab down --name "$lab" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

# Nanoseconds that a process has run.
ran() { cat /proc/"$1"/task/*/schedstat | awk '{ sum += $1 } END { print sum + 0 }'; }

# What a process takes while nothing is asked of it.
idle() {
    local before after
    before=$(ran "$2")
    sleep "$seconds"
    after=$(ran "$2")
    awk -v ns=$((after - before)) -v s="$seconds" -v what="$1" \
        'BEGIN { printf "%-28s %6.3f %% of a processor over %d s\n", what, ns / s / 1e7, s }'
}

# What a process took so far: its start.
start() { awk -v ns="$(ran "$2")" -v what="$1" 'BEGIN { printf "%-28s %6.0f ms of processor time\n", what, ns / 1e6 }'; }

# Datagrams of a pod, each after a second of silence: from when one is sent until `observe --follow` printed it.
observed() {
    local target pid sent
    target=$("$cirri" lab exec --name "$lab" idle/p2 -- ip -4 -o addr show dev eth0 | sed 's/.*inet \([0-9.]*\).*/\1/')
    "$cirri" --socket "/run/cirri/lab/$lab/nodes/node1/state/agent.sock" observe --follow --port 9 -o json >"$work/flows" &
    pid=$!
    sleep 2
    for n in $(seq 20); do
        sent=$("$cirri" lab exec --name "$lab" idle/p1 -- \
            bash -c "exec 3>/dev/udp/$target/9; date +%s%N; echo . >&3")
        while [ "$(wc -l <"$work/flows")" -lt "$n" ]; do :; done
        echo $(($(date +%s%N) - sent))
        sleep 1
    done | sort -n | awk '{ all[NR] = $1 / 1e6 }
        END { printf "%-28s %6.1f ms median, %.1f ms most, of %d\n", "sent to observed", all[int((NR + 1) / 2)], all[NR], NR }'
    kill $pid
}

echo "Linux $(uname -r), $(nproc) processors, load $(cut -d' ' -f1-3 /proc/loadavg)"

agent_pid() { "$cirri" lab list --name "$lab" -o json | sed -n 's/.*"pid": *\([0-9]\+\).*/\1/p' | head -1; }
"$cirri" lab up --name "$lab" --nodes 1 >/dev/null 2>&1
start "agent, first start" "$(agent_pid)"
{
    echo "apiVersion: v1"
    echo "kind: Namespace"
    echo "metadata: {name: idle}"
    for n in $(seq 20); do
        printf -- '---\napiVersion: v1\nkind: Pod\nmetadata: {name: p%s, namespace: idle, labels: {app: p%s}}\n' "$n" "$n"
        echo 'spec: {containers: [{name: c, command: [sleep, "100000"]}]}'
    done
} >"$work/pods.yaml"
"$cirri" lab apply --name "$lab" --wait -f "$work/pods.yaml" >/dev/null 2>&1
sleep 15
idle "agent, 20 pods, no traffic" "$(agent_pid)"
observed
"$cirri" lab restart --name "$lab" node1 >/dev/null 2>&1
start "agent, restart" "$(agent_pid)"

ip netns add "$place"
ip netns add "$servers"
in_place() { nsenter --net=/run/netns/"$place" "$@"; }
in_servers() { nsenter --net=/run/netns/"$servers" "$@"; }
ip link add eth0 netns "$place" type veth peer name eth0 netns "$servers"
in_place ip link set lo up
in_place ip address add 192.0.2.1/24 dev eth0
in_place ip link set eth0 up
in_servers ip address add 192.0.2.2/24 dev eth0
for n in $(seq 11 20); do in_servers ip address add 192.0.2."$n"/24 dev eth0; done
in_servers ip link set eth0 up
mkdir "$work/www"
echo ok >"$work/www/index.html"
nsenter --net=/run/netns/"$servers" busybox httpd -f -p 8080 -h "$work/www" &
{
    printf 'devices: [eth0]\nacceleration: off\nstateDir: %s\nbpf: {instance: idle-%s}\nservices:\n' "$work/state" $$
    printf '  - name: web\n    address: 203.0.113.10\n    port: 80\n    health: {type: http, path: /, interval: 2s}\n    backends:\n'
    for n in $(seq 11 20); do printf '      - {name: b%s, address: 192.0.2.%s, port: 8080}\n' "$n" "$n"; done
} >"$work/lb.yaml"
start_lb() {
    # Not by a function: its process would be a shell's.
    nsenter --net=/run/netns/"$place" "$cirri" lb --config "$work/lb.yaml" 2>>"$work/lb.log" &
    lb=$!
    until "$cirri" lb status --config "$work/lb.yaml" >/dev/null 2>&1; do
        kill -0 $lb || { cat "$work/lb.log"; exit 1; }
        sleep 0.2
    done
}
start_lb
start "lb, first start" $lb
sleep 15
"$cirri" lb list --config "$work/lb.yaml" -o json >"$work/list" || true
up=$(grep -c '"state": "active"' "$work/list" || true)
[ "$up" -ge 10 ] || { echo "only $up backends are up"; cat "$work/lb.log" "$work/list"; exit 1; }
idle "lb, 10 HTTP checks at 2 s" $lb
kill $lb
wait $lb || true
start_lb
start "lb, restart" $lb
