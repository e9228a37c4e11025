"""Common English words of two to eight letters, for printed text."""

from __future__ import annotations

WORDS = tuple(
    """
at be by do go he if in is it me my no of on or so to up us we
act add age air all and any arm art ask bad bag bed bee big bit box boy bus buy can cap car cat cow cry cup cut
day dig dog dry ear eat egg end eye far few fit fix fly fog fox fun gas get gum hat hen hit hot hug ice ink jam
jar jet job joy key kid kit lab lap law leg let lid lip log low mad man map mix mud net new nut oak oil old one
owl own pan pay pen pet pie pig pot put rag ran red rib row run sad sea sit sky son sun tap tea ten tie tin top
toy two van vet wax way web win yes zip zoo
able acid also area army away baby back ball band bank barn bath bean bear beat bell belt bend best bike bird
blue boat body bold bone book boot born bowl bulb busy cake call calm camp card care cart case cash chef chin
city clay club coal coat coin cold cook cool copy corn cost crab crew crop cube dark date dawn deck deep deer
desk dice dish dock door down draw drum duck dust duty each east easy echo edge even exit face fact fair farm
fast film fire fish flag flat flow foam fold food fork form free frog fuel full gate gift girl give glad glue
goat gold golf good grey grow gulf hair half hall hand harp hawk head help herb hero high hill hive home hook
hope horn host hour huge hunt idea inch iron item jazz join joke jump junk just keep kind king kite knee knot
lace lake lamp land last lava lazy leaf left lens life lift lily lime line lion list live loaf lock long loop
loud luck lung main many mask maze meal mile milk mill mind mint moon moss moth move much navy near neck need
nest news next nice nose note oath oven over page pair palm park part past path peak pear plan play plum poem
pond pony pool port post pump pure quiz race rain rare read rice rich ring road rock roof room root rope rose
ruby safe sail salt sand save seal seed ship shoe shop show silk sing sink skin slow snow soap sock soft soil
song soup star stem step swan swim tail tall team tent test tide time tiny tool town tree trip true tube tuna
turn unit vase vast verb vine vote walk wall warm wash wave wing wolf wood wool word work yard year zero zone
about above actor after alarm album amber angle apple April arrow beach berry black blank board brave bread
brick bridge broom brown brush cabin camel candy chair chalk cheese cherry child clock cloud coach coral corner
cotton crown dance desert dinner doctor dragon dream eagle early earth eight engine fabric family farmer father
feather fence field finger flame flower forest fresh friend frozen fruit garden ghost giant glass globe grape
grass green guitar hammer happy harbor heart honey horse hotel house island jacket jewel judge juice jungle
kettle kitchen ladder laptop lemon letter light lizard lunch magic maple market marble melon metal middle mirror
money monkey month mother motor mouse museum music needle night north number ocean office olive onion orange
orbit oxygen paint panda paper parade parrot peach pencil pepper phone photo piano pillow pilot pizza planet
plant plate pocket potato puzzle queen quick quiet rabbit radio river robot rocket saddle salad school season
seven shadow sheep shell shirt silver simple sister sleep smile snake south spice spoon spring square stone storm
street string sugar summer sunset table teacher thunder ticket tiger toast tomato tower train travel tunnel turtle
uncle valley velvet village violet voice wagon water weather whale wheat wheel window winter yellow young zebra
airport balloon blanket cabinet captain capital century chapter chicken compass country crystal diamond dolphin
evening factory fashion gallery giraffe holiday journey kingdom lantern leather library machine morning mystery
network octopus package passage penguin pilgrim popcorn quarter rainbow sailor science shelter soldier station
sunrise trumpet umbrella vacation windmill airplane baseball birthday building calendar children daughter dinosaur
elephant festival hospital keyboard language mountain notebook painting physical pleasant question sandwich
scissors shoulder sunlight swimming treasure triangle vegetable
""".lower().split()
)
WORDS = tuple(sorted({word for word in WORDS if 2 <= len(word) <= 8}))
