# Completion of dog and collie for bash; made by packaging/make-docs.
_dog_volumes() {
    timeout 2 dog vdi list -r "$@" 2>/dev/null | sed -E 's/^. (([^\ ]|\\.)*) .*/\1/; s/\\(.)/\1/g' | sort -u
}

_dog() {
    local words= volumes= path= name= current=${COMP_WORDS[COMP_CWORD]} place= where=()
    case $COMP_CWORD in
    1) path= ;;
    2) path=${COMP_WORDS[1]} ;;
    3) path="${COMP_WORDS[1]} ${COMP_WORDS[2]}" ;;
    *) path="${COMP_WORDS[1]} ${COMP_WORDS[2]} ${COMP_WORDS[3]}" ;;
    esac
    case $path in
    "") words="vdi node cluster vm benchmark upgrade nbd iscsi store simulate help" ;;
    vdi) words="check create snapshot clone delete rollback list tree graph object track setattr getattr resize read write backup restore alter-copy lock cache export import" ;;
    "vdi check" | "vdi check "*) words="-s --snapshot -e --exist -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi create" | "vdi create "*) words="-P --prealloc -y --hyper -c --copies -a --address -p --port -h --help -r --raw -v --verbose -z --block_size_shift -T --time"; volumes=1 ;;
    "vdi snapshot" | "vdi snapshot "*) words="-s --snapshot -a --address -p --port -h --help -r --raw -v --verbose -R --reduce_identical_snapshots -T --time"; volumes=1 ;;
    "vdi clone" | "vdi clone "*) words="-s --snapshot -P --prealloc -n --no_share -a --address -p --port -h --help -r --raw -v --verbose -T --time"; volumes=1 ;;
    "vdi delete" | "vdi delete "*) words="-s --snapshot -a --address -p --port -B --batched_reclamation -I --interval -m --max_reclaim -h --help -T --time"; volumes=1 ;;
    "vdi rollback" | "vdi rollback "*) words="-s --snapshot -a --address -p --port -f --force -r --raw -v --verbose -B --batched_reclamation -I --interval -h --help -T --time"; volumes=1 ;;
    "vdi list" | "vdi list "*) words="-a --address -p --port -r --raw -o --oid -h --help -T --time --json"; volumes=1 ;;
    "vdi tree" | "vdi tree "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "vdi graph" | "vdi graph "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "vdi object location" | "vdi object location "*) words="-i --index -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi object map" | "vdi object map "*) words="-i --index -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi object explain" | "vdi object explain "*) words="-i --index -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi object dump-inode" | "vdi object dump-inode "*) words="-i --index -s --snapshot -a --address -p --port -h --help -T --time --json" ;;
    "vdi object" | "vdi object "*) words="location map explain dump-inode -i --index -s --snapshot -a --address -p --port -h --help -T --time --json" ;;
    "vdi track" | "vdi track "*) words="-i --index -s --snapshot -o --oid -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi setattr" | "vdi setattr "*) words="-d --delete -x --exclusive -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi getattr" | "vdi getattr "*) words="-a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi resize" | "vdi resize "*) words="-a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi read" | "vdi read "*) words="-s --snapshot -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi write" | "vdi write "*) words="-w --writeback -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi backup" | "vdi backup "*) words="-s --snapshot -F --from -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi restore" | "vdi restore "*) words="-s --snapshot -a --address -p --port -B --batched_reclamation -I --interval -h --help -T --time"; volumes=1 ;;
    "vdi alter-copy" | "vdi alter-copy "*) words="-c --copies -f --force -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi lock list" | "vdi lock list "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json" ;;
    "vdi lock unlock" | "vdi lock unlock "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi lock" | "vdi lock "*) words="list unlock -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi cache flush" | "vdi cache flush "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi cache delete" | "vdi cache delete "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi cache info" | "vdi cache info "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json" ;;
    "vdi cache purge" | "vdi cache purge "*) words="-s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi cache" | "vdi cache "*) words="flush delete info purge -s --snapshot -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    "vdi export" | "vdi export "*) words="-s --snapshot -O --format -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "vdi import" | "vdi import "*) words="-c --copies -z --block_size_shift -O --format -a --address -p --port -h --help -T --time"; volumes=1 ;;
    node) words="list info stat kill may-stop recovery md scrub log vnodes format" ;;
    "node list" | "node list "*) words="-a --address -p --port -r --raw -v --verbose -h --help -T --time --json" ;;
    "node info" | "node info "*) words="-a --address -p --port -r --raw -v --verbose -h --help -T --time --json" ;;
    "node stat" | "node stat "*) words="-a --address -p --port -r --raw -w --watch -h --help -T --time --json" ;;
    "node kill" | "node kill "*) words="-a --address -p --port -r --raw -l --local -h --help -T --time" ;;
    "node may-stop" | "node may-stop "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "node recovery info" | "node recovery info "*) words="-a --address -p --port -P --progress -r --raw -h --help -T --time --json" ;;
    "node recovery set-throttle" | "node recovery set-throttle "*) words="-a --address -p --port -P --progress -r --raw -h --help -T --time --json" ;;
    "node recovery get-throttle" | "node recovery get-throttle "*) words="-a --address -p --port -P --progress -r --raw -h --help -T --time --json" ;;
    "node recovery" | "node recovery "*) words="info set-throttle get-throttle -a --address -p --port -P --progress -r --raw -h --help -T --time --json" ;;
    "node md info" | "node md info "*) words="-a --address -p --port -r --raw -A --all -f --force -h --help -T --time --json" ;;
    "node md plug" | "node md plug "*) words="-a --address -p --port -r --raw -A --all -f --force -h --help -T --time --json" ;;
    "node md unplug" | "node md unplug "*) words="-a --address -p --port -r --raw -A --all -f --force -h --help -T --time --json" ;;
    "node md" | "node md "*) words="info plug unplug -a --address -p --port -r --raw -A --all -f --force -h --help -T --time --json" ;;
    "node scrub status" | "node scrub status "*) words="-a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node scrub start" | "node scrub start "*) words="-a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node scrub stop" | "node scrub stop "*) words="-a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node scrub schedule" | "node scrub schedule "*) words="-a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node scrub" | "node scrub "*) words="status start stop schedule -a --address -p --port -r --raw -A --all -h --help -T --time --json" ;;
    "node log level get" | "node log level get "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "node log level set" | "node log level set "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "node log level list" | "node log level list "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "node log level" | "node log level "*) words="get set list -a --address -p --port -h --help -T --time --json" ;;
    "node log" | "node log "*) words="level -a --address -p --port -h --help -T --time --json" ;;
    "node vnodes set" | "node vnodes set "*) words="-a --address -p --port -h --help" ;;
    "node vnodes" | "node vnodes "*) words="set -a --address -p --port -h --help" ;;
    "node format" | "node format "*) words="-a --address -p --port -h --help -T --time" ;;
    cluster) words="info format health shutdown recover reweight check alter-copy snapshot" ;;
    "cluster info" | "cluster info "*) words="-a --address -p --port -r --raw -v --verbose -d --diff -h --help -T --time --json" ;;
    "cluster format" | "cluster format "*) words="-b --store -c --copies -l --lock -t --strict -z --block_size_shift -V --fixed_vnodes -R --recycle_vid -f --force -F --avoid_diskfull --recovery-delay -a --address -p --port -h --help -T --time" ;;
    "cluster health" | "cluster health "*) words="-a --address -p --port -h --help -T --time --json" ;;
    "cluster shutdown" | "cluster shutdown "*) words="-a --address -p --port -h --help -T --time" ;;
    "cluster recover force" | "cluster recover force "*) words="-f --force -a --address -p --port -h --help -T --time" ;;
    "cluster recover enable" | "cluster recover enable "*) words="-f --force -a --address -p --port -h --help -T --time" ;;
    "cluster recover disable" | "cluster recover disable "*) words="-f --force -a --address -p --port -h --help -T --time" ;;
    "cluster recover" | "cluster recover "*) words="force enable disable -f --force -a --address -p --port -h --help -T --time" ;;
    "cluster reweight" | "cluster reweight "*) words="-a --address -p --port -h --help -T --time" ;;
    "cluster check" | "cluster check "*) words="-a --address -p --port -h --help -T --time" ;;
    "cluster alter-copy" | "cluster alter-copy "*) words="-c --copies -f --force -a --address -p --port -h --help -T --time" ;;
    "cluster snapshot save" | "cluster snapshot save "*) words="-m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    "cluster snapshot list" | "cluster snapshot list "*) words="-m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    "cluster snapshot show" | "cluster snapshot show "*) words="-m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    "cluster snapshot load" | "cluster snapshot load "*) words="-m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    "cluster snapshot delete" | "cluster snapshot delete "*) words="-m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    "cluster snapshot" | "cluster snapshot "*) words="save list show load delete -m --multithread -f --force -a --address -p --port -h --help -T --time --json" ;;
    vm) words="list" ;;
    "vm list" | "vm list "*) words="-a --address -p --port -r --raw -h --help -T --time --json" ;;
    benchmark) words="io run" ;;
    "benchmark io" | "benchmark io "*) words="-f --force -w --workqueue -n --nr_threads -t --total -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "benchmark run" | "benchmark run "*) words="-c --copies -S --size -d --seconds -n --rounds -a --address -p --port -r --raw -h --help -T --time --json" ;;
    upgrade) words="inode-convert epoch-convert config-convert object-location" ;;
    "upgrade inode-convert" | "upgrade inode-convert "*) words="-o --orig -h --help -T --time" ;;
    "upgrade epoch-convert" | "upgrade epoch-convert "*) words="-o --orig -h --help -T --time" ;;
    "upgrade config-convert" | "upgrade config-convert "*) words="-h --help -T --time" ;;
    "upgrade object-location" | "upgrade object-location "*) words="-o --orig -h --help -T --time" ;;
    nbd) words="serve uri" ;;
    "nbd serve" | "nbd serve "*) words="--socket --listen --tls-certificates --tls-psk --tls-verify-peer --readonly --exclusive --mode --group --threads --spread --swap -a --address -p --port -h --help" ;;
    "nbd uri" | "nbd uri "*) words="--socket --listen --tls-certificates --tls-psk --tls-verify-peer --readonly --tls-hostname -a --address -p --port -r --raw -h --help -T --time --json" ;;
    iscsi) words="export list unexport apply clear tgt-config" ;;
    "iscsi export" | "iscsi export "*) words="--initiator --portal --iqn --chap --secret-file --mutual --mutual-secret-file --discovery --discovery-secret-file --readonly --shared --host -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "iscsi list" | "iscsi list "*) words="--host -a --address -p --port -r --raw -h --help -T --time --json" ;;
    "iscsi unexport" | "iscsi unexport "*) words="-f --force --host -a --address -p --port -h --help -T --time"; volumes=1 ;;
    "iscsi apply" | "iscsi apply "*) words="--host -a --address -p --port -h --help -T --time" ;;
    "iscsi clear" | "iscsi clear "*) words="--host -a --address -p --port -h --help -T --time" ;;
    "iscsi tgt-config" | "iscsi tgt-config "*) words="--initiator --iqn --tid --host -a --address -p --port -h --help -T --time --json"; volumes=1 ;;
    store) words="check salvage" ;;
    "store check" | "store check "*) words="-j --journal -h --help -T --time --json" ;;
    "store salvage" | "store salvage "*) words="-V --vdi -s --snapshot -j --journal -r --raw -h --help -T --time --json" ;;
    "simulate" | "simulate "*) words="--from-cluster --topology --nodes --zones --used -c --copies --fail --rate --seeds -a --address -p --port -h --help -T --time --json" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    case $current in
    -*) return ;;
    esac
    if [ -n "$volumes" ]; then
        for ((place = 1; place < COMP_CWORD - 1; place++)); do
            case ${COMP_WORDS[place]} in
            -a | -p | --address | --port) where+=("${COMP_WORDS[place]}" "${COMP_WORDS[place + 1]}") ;;
            esac
        done
        while IFS= read -r name; do
            printf -v name %q "$name"
            [[ $name != "$current"* ]] || COMPREPLY+=("$name")
        done < <(_dog_volumes "${where[@]}")
    fi
}
complete -o default -F _dog dog collie
